"""When experts took their roles, over the checkpoints of a run, and whether other seeds give the same roles."""
