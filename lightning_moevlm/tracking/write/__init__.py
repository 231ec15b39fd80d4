"""Writes metrics and files to MLflow, also while it is unreachable."""
