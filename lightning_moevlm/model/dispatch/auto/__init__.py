"""Chooses the fastest dispatcher from measured timings."""
