"""Resolves every run of a study and checks it before the first one starts."""
