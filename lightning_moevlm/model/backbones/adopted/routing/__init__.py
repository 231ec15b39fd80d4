"""The routing of a model of transformers as ours: routers found, replaced by layers that make plans, and exact."""
