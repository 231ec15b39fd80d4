"""Declared ablation studies: spec -> plan -> execute -> results -> report."""
