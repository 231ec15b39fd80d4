"""Keeps the optimiser's configured options when a checkpoint is loaded.

torch stores weight decay, betas and eps beside the moments and restores them too. An arm resumed with another weight
decay would silently continue with the old one.
"""

from torch.optim import Optimizer


class ConfiguredOptions:
    """The options of every parameter group, as configured.

    Args:
        optimizer: new, with its schedule.
        keeps_rate: whether the learning rate is an option too, because no schedule sets it.
    """

    def __init__(self, optimizer: Optimizer, keeps_rate: bool) -> None:
        self._optimizer = optimizer
        left_out = {"params"} if keeps_rate else {"params", "lr"}
        self._options = [
            {name: value for name, value in group.items() if name not in left_out} for group in optimizer.param_groups
        ]

    def restore(self) -> None:
        """Put them back."""
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)
