"""Runs experts segment by segment on sorted tokens."""
