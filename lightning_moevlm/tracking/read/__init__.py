"""Reads runs and metrics back from MLflow."""
