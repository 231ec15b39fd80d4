"""Starts one run as a process: command line, files, signals."""
