"""Sparse mixture-of-experts vision-language models: train, ablate, compare."""

__version__ = "0.1.0"
