"""Routers whose choice is learned."""
