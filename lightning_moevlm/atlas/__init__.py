"""The atlas of experts: which expert serves what, whether that is more than chance, and whether it matters."""
