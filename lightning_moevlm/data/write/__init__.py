"""Builds and converts sets."""
