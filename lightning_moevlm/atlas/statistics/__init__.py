"""Is it more than chance: shares, lifts, information and its null models."""
