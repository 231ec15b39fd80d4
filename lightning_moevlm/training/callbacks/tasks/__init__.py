"""Callbacks that judge a model by tasks on held-out data."""
