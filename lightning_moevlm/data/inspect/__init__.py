"""Checks a set and shows its samples."""
