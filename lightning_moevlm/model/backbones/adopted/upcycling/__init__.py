"""Dense feed-forwards of transformers models as mixtures of ours."""
