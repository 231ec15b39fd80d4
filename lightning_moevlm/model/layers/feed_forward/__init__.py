"""Feed-forward blocks: dense, mixture of experts, multiway."""
