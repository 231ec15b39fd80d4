"""Refuses a precision policy that cannot reach a model's routers."""

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.precision import PrecisionPolicy
from lightning_moevlm.model.routers import Router


def refuse_unreached_routers(policy: PrecisionPolicy, backbone: Backbone) -> None:
    """Refuse a dtype of routers that compute in one of their own."""
    if policy.router in (None, "float32"):
        return
    if any(isinstance(module, Router) and module.keeps_dtype for module in backbone.modules()):
        raise UserError(
            f"model.precision.router = {policy.router} reaches no router of transformers, which computes in a dtype of "
            "its own: set it to float32 or null, or name a router of ours in model.backbone.router"
        )
