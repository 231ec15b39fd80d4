"""The records that folders exchange: routing plans, batches, step records, metric keys."""
