"""Moves batches from worker processes to the device."""
