"""Executes the runs of a plan and records their outcome."""
