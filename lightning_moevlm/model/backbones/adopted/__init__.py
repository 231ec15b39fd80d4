"""Models of Hugging Face transformers, whose routing becomes our plans."""
