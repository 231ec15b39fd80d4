"""Who goes where: routers turn tokens into plans and know no expert, loss, metric or config."""

from lightning_moevlm.routers.router import Router
from lightning_moevlm.routers.top_k import TopKRouter

__all__ = ["Router", "TopKRouter"]
