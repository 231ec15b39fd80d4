"""Helpers without any knowledge of MoE: errors, files, numbers, text."""
