"""Auxiliary losses that keep logits and router weights small or apart."""
