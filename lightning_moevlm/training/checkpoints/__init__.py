"""Saves and restores the exact state of training."""
