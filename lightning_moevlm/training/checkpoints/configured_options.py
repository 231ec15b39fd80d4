"""What an optimiser is configured with stays what the command line says, also after a checkpoint is loaded.

torch stores weight decay, betas and eps beside the moments and puts them back with them; an arm resumed with another
weight decay would go on with the old one and nobody would know.
"""

from torch.optim import Optimizer


class ConfiguredOptions:
    """The options of every parameter group, as configured.

    Args:
        optimizer: just built, its schedule too.
        keeps_rate: the learning rate is an option as well, because no schedule sets it.
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
