"""Timing of reading, decoding and loaders."""
