"""Records what a run was: configuration, code, data, machine."""
