"""Builds the tables of reports."""
