"""Recordings of the steps around a spike: their format, and those of a run."""
