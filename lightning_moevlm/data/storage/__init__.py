"""Opens shards in folders, on web servers and in object stores."""
