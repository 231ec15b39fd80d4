"""What an audit finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SharedExperts:
    """Experts that every token visits.

    name: of the module in the block.
    size: parameters, in units of one routed expert.
    """

    name: str
    size: float


@dataclass(frozen=True)
class BalancingBias:
    """A number per expert that a router adds to its scores.

    name: in the router or its block.
    mover: what moves it in training: "gradient" or "nothing".
    lowest, highest: its values.
    """

    name: str
    mover: str
    lowest: float
    highest: float


@dataclass(frozen=True)
class RouterFacts:
    """A router beside its experts.

    path: of the router in the model.
    kind: name of its class.
    score: function of the logits that weights are made of; None: not known.
    weight_sum: of a token's weights, None if it is not constant.
    modality: of the only tokens that it gets, None for all.
    """

    path: str
    kind: str
    num_experts: int
    top_k: int
    score: str | None
    weight_sum: float | None
    modality: str | None
    shared: tuple[SharedExperts, ...]
    bias: BalancingBias | None


@dataclass(frozen=True)
class Setting:
    """What the model's balance loss does under one setting of its switches.

    name: the setting.
    added: to the loss, with the coefficient of the configuration; None if the model failed.
    share: of the gradient on the routers, |that of the balance| / |that of the loss|.
    scale: added / coefficient x balance of the same plans; None if the balance is not defined for the router.
    failure: message of the model.
    """

    name: str
    added: float | None
    share: float | None = None
    scale: float | None = None
    failure: str = ""

    @property
    def verdict(self) -> str:
        """`alive`, `dead`, `doubled`, `scaled`, or `fails`."""
        if self.added is None:
            return "fails"
        if self.added == 0 and not self.share:
            return "dead"
        if self.scale is None or abs(self.scale - 1) < 0.02:
            return "alive"
        return "doubled" if abs(self.scale - 2) < 0.04 else "scaled"


@dataclass(frozen=True)
class OwnBalance:
    """The balance loss that transformers has for the model.

    function: its name and module; None: the model's file has none.
    coefficients: by name, as configured; () if the configuration has none.
    settings: the first is as configured, each other one turns one switch on.
    over_parts: what the Trainer of transformers sums over two micro-batches or ranks / what it has for both at once,
        under the first setting that acts; None if none does.
    """

    function: str | None
    coefficients: tuple[tuple[str, float], ...]
    settings: tuple[Setting, ...]
    over_parts: float | None

    @property
    def acting(self) -> Setting | None:
        """The first setting under which it acts."""
        return next((each for each in self.settings if each.verdict not in ("dead", "fails")), None)


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of one modality were spread over the experts of one layer.

    tokens: that the layer routed. loads: share of the choices of each expert.
    entropy: of the loads, over ln E. max_violation: largest load over the mean load, - 1.
    """

    path: str
    modality: str
    tokens: int
    loads: tuple[float, ...]
    entropy: float
    max_violation: float

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token chose."""
        return tuple(expert for expert, load in enumerate(self.loads) if load == 0)


@dataclass(frozen=True)
class Audit:
    """One page about one model."""

    model: str
    family: str
    transformers: str
    num_parameters: int
    num_layers: int
    routers: tuple[RouterFacts, ...]
    balance: OwnBalance
    loads: tuple[LayerLoad, ...]

    @property
    def dead(self) -> dict[str, tuple[int, ...]]:
        """Experts that no token of any modality chose, by router; routers without any are left out."""
        chosen: dict[str, list[float]] = {}
        for each in self.loads:
            before = chosen.setdefault(each.path, [0.0] * len(each.loads))
            chosen[each.path] = [a + b for a, b in zip(before, each.loads, strict=True)]
        found = {path: tuple(e for e, load in enumerate(loads) if load == 0) for path, loads in chosen.items()}
        return {path: dead for path, dead in found.items() if dead}
