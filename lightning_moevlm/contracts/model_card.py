"""The size and cost of a model, as studies compare them."""

from typing import NamedTuple


class ModelCard(NamedTuple):
    """Costs of a backbone.

    total_parameters: all. active_parameters: without the experts that a token does not visit.
    active_flops_per_sample: matrix FLOPs of one forward pass over one image-text pair of full length; a multiply and an
    add count as two. Held against torch's FlopCounterMode within 1 % by a test.
    """

    total_parameters: int
    active_parameters: int
    active_flops_per_sample: int
