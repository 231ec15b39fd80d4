"""Commands on runs that have been made."""
