"""Sets of shards from images and captions that lie in other forms."""
