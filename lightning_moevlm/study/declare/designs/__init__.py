"""Designs: factors become the combinations of levels that are trained."""
