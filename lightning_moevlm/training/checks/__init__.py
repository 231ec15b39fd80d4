"""Refuses configurations that cannot train, before the first step."""
