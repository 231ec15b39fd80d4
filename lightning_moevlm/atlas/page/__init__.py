"""The atlas as a page, and as records beside it."""
