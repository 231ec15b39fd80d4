"""Collects the results of runs, and checks that they may be compared."""
