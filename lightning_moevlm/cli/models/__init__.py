"""Commands on models: their weights and their routing."""
