"""Learned routers whose tokens use different numbers of experts."""
