"""Turns the errors of jsonargparse and Lightning into one line: what came, what is allowed, what to change."""
