"""What is known of each token of a probe."""
