"""Everything a model is made of: routers, dispatch, experts, layers, losses, backbones, objectives, metrics."""
