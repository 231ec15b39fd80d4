"""The size and cost of a model, as studies compare them."""

from typing import NamedTuple


class ModelCard(NamedTuple):
    """Costs of a backbone.

    total_parameters: all parameters.
    active_parameters: parameters without the experts that a token does not visit.
    active_flops_per_sample: matrix FLOPs of one forward pass over one image-text pair of full length. A multiply and an
        add count as two. A test compares them with torch's FlopCounterMode, within 1 %.
    """

    total_parameters: int
    active_parameters: int
    active_flops_per_sample: int
