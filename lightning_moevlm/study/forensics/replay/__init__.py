"""Counterfactual replay: the steps around an event once more, each time with one change."""
