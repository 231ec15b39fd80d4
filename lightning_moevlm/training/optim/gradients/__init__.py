"""Stabilisers that act on gradients and updates."""
