"""Pure statistics: intervals, tests, power, effects, stability."""
