"""Ends a run: on divergence, on a signal, with a last checkpoint; refuses monitors that are not measured."""
