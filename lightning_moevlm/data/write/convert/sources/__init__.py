"""Reads the formats that `moevlm data convert` takes."""
