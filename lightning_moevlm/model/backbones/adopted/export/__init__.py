"""Writes models of transformers, adopted or upcycled, as transformers reads them."""
