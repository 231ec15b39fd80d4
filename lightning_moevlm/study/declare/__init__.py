"""Reads a study file: arms, factors, designs, budget, comparison."""
