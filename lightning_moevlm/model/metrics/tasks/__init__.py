"""Scores of tasks on held-out data, each beside what needs no model."""
