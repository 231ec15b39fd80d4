"""The choices of experts for the tokens of a probe."""
