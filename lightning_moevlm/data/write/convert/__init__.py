"""Converts images and captions in other forms to sets of shards."""
