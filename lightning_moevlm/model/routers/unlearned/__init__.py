"""Routers without weights: controls and fixed assignments."""
