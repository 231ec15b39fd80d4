"""Reads and describes a set on disk: manifest, tokenizer, tar members, faults."""
