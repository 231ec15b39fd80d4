"""What experts are needed for: routing plans changed in one layer, and the effect on each sample."""
