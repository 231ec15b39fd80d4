"""Turns shards into batches: order, mixture, resume."""
