"""Texts of samples: captions, tokens."""
