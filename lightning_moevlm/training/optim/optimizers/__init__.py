"""Optimisers beyond torch's own."""
