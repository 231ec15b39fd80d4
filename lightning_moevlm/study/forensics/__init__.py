"""Explains spikes from recordings: what moved first, and the illnesses whose signs it shows."""
