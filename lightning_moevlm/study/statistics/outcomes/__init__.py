"""Judges how single runs ended: stable, diverged, not learned."""
