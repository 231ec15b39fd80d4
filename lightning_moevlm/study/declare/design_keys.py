"""Every design that a study file can name: the arms it makes, the factors it takes, its options. See `read_design`."""

from dataclasses import dataclass

from lightning_moevlm.study.declare.design import KINDS, Kind
from lightning_moevlm.study.declare.schema import TEXT, Block, Key, list_of, node_of, number, whole

LADDER_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of arXiv 2309.14322

FACTORS = Key(
    "factors",
    node_of("list of names, or [] for none"),
    "Factors that it varies.",
    "[qk_norm, router_z]",
    default_words="all; required inside a product",
)
RESOLUTION: Key[int | None] = Key(
    "resolution",
    whole(least=3),
    "Shortest product of factors that the fraction cannot tell from the mean: 3, 4 or 5.",
    "4",
)
GENERATORS = Key(
    "generators",
    node_of("mapping of a factor to a list of factors"),
    "Instead of a resolution. The factor is on where an odd number of the listed ones is on.",
    "{d: [a, b, c]}",
)
RATES = Key(
    "rates",
    list_of(number(above=0.0)),
    "Peak learning rates, ascending.",
    "[1.0e-3, 1.0e-2, 1.0e-1]",
    default_words=", ".join(f"{rate:g}" for rate in LADDER_RATES),
)
RATE_KEY = Key(
    "key", TEXT, "Configuration key of the learning rate.", "model.groups.lr", default="model.optimizer.init_args.lr"
)
SIZES = Key(
    "levels",
    node_of("mapping of names to changes, at least two"),
    "Sizes: the changed keys of each. The first one is the reference.",
    "{w32: {model.backbone.init_args.dim: 32}, w64: {}}",
    is_required=True,
)


@dataclass(frozen=True)
class DesignPage:
    """One design. arms: what it makes; takes: which factors; options: keys below its name; example: YAML."""

    kind: Kind
    arms: str
    takes: str
    options: Block
    example: str


def _page(kind: Kind, arms: str, takes: str, example: str, *options: Key[object]) -> DesignPage:
    return DesignPage(kind, arms, takes, Block("", "", options), example)


_SWITCHES, _ANY = "switches (`on`, `off`)", "switches and factors with `levels`"
_PAGES = (
    _page(
        "one_in",
        "The reference, and each factor alone at each other of its levels.",
        _ANY,
        "one_in",
        FACTORS,
    ),
    _page("leave_one_out", "All switches on, and each one off.", _SWITCHES, "leave_one_out", FACTORS),
    _page(
        "factorial",
        "All combinations of switches, 2^k.",
        _SWITCHES,
        "{factorial: {factors: [qk_norm, router_z]}}",
        FACTORS,
    ),
    _page(
        "fractional_factorial",
        "A part of all combinations that still tells main effects apart. `sweep plan` prints its aliases.",
        _SWITCHES,
        "{fractional_factorial: {resolution: 4}}",
        *(FACTORS, RESOLUTION, GENERATORS),
    ),
    _page("grid", "All combinations of factors with any number of levels.", _ANY, "grid", FACTORS),
    _page(
        "lr_sensitivity",
        "All combinations at every learning rate of a ladder (arXiv 2309.14322). Brings the factor `lr`.",
        _ANY,
        "{lr_sensitivity: {rates: [1.0e-3, 1.0e-2, 1.0e-1]}}",
        *(FACTORS, RATES, RATE_KEY),
    ),
    _page(
        "size_ladder",
        "All combinations at every size. Brings the factor `size`.",
        _ANY,
        "{size_ladder: {levels: {w32: {model.backbone.init_args.dim: 32}, w64: {}}}}",
        *(FACTORS, SIZES),
    ),
    _page(
        "product",
        "Every arm of one design with every arm of another.",
        "a list of designs, each naming its factors",
        "{product: [{leave_one_out: {factors: [a, b]}}, {lr_sensitivity: {factors: []}}]}",
    ),
)
DESIGNS: dict[Kind, DesignPage] = {page.kind: page for page in _PAGES}
assert tuple(DESIGNS) == KINDS
