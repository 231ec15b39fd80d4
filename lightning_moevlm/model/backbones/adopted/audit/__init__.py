"""Audits the routing of a model of transformers without training it: routers, balance, loads."""
