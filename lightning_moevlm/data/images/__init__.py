"""Decodes, encodes and augments images."""
