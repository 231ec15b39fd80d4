"""Reads the samples of a set of shards as rows of another set."""
