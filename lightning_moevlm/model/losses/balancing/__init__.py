"""Auxiliary losses that balance the load of experts."""
