"""The tokens of which an expert is surest, with their surroundings."""
