"""Lets the garbage collector run rarely in the tests, before the package notes how often it does.

Tests make many objects and few circles: with Python's thresholds it takes up to a tenth of their time.
"""

import gc

gc.set_threshold(20_000, 20, 20)
