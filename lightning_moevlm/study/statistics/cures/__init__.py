"""Judges cures: the share of an illness's damage that a change undoes."""
