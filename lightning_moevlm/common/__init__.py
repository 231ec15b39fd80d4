"""Errors, files, numbers and text: what every folder uses and none is about mixture-of-experts models."""
