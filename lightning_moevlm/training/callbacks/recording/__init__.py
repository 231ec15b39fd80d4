"""The flight recorder: keeps the last steps of a run, and writes them when something goes wrong."""
