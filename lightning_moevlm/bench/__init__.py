"""Benchmarks to run on your own machine, compared with other packages."""
