"""Sets of shards from pictures and captions that lie in other forms."""
