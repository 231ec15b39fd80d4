"""YAML files and flags to checked options."""
