"""Draws the demo sets."""
