"""What experts serve, logged while a model trains."""

from lightning_moevlm.atlas.live.expert_roles import ExpertRoles

__all__ = ["ExpertRoles"]
