"""The facts of one optimiser step: its output, size, routing counts, and when it is logged."""
