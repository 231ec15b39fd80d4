"""Lists the designs of a study file: the arms they make, the factors they take, their options."""

from dataclasses import dataclass
from typing import Annotated

from lightning_moevlm.study.declare.decode import Record, doc, kind
from lightning_moevlm.study.declare.designs.design import KINDS, Kind
from lightning_moevlm.study.declare.factors import Changes
from lightning_moevlm.study.declare.value_types import ConfigFile, Metric, Seed
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

_CURES = "list of cures, or [] for none"
LADDER_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of arXiv 2309.14322


class DesignKeys(Record, frozen=True):
    """Options of every design."""

    factors: Annotated[
        YamlNode | None,
        doc(
            "Factors that it varies.",
            "[qk_norm, router_z]",
            "list of names, or [] for none",
            "all; required inside a product",
        ),
    ] = None


class FractionKeys(DesignKeys, frozen=True):
    """Options of a fraction."""

    resolution: Annotated[
        Annotated[int, kind("whole number >= 3", ge=3)] | None,
        doc("Shortest product of factors that the fraction cannot tell from the mean: 3, 4 or 5.", "4"),
    ] = None
    generators: Annotated[
        YamlNode | None,
        doc(
            "Instead of a resolution. The factor is on where an odd number of the listed ones is on.",
            "{d: [a, b, c]}",
            "mapping of a factor to a list of factors",
        ),
    ] = None


class RateKeys(DesignKeys, frozen=True):
    """Options of a ladder of learning rates."""

    rates: Annotated[
        YamlNode | None,
        doc(
            "Peak learning rates, ascending.",
            "[1.0e-3, 1.0e-2, 1.0e-1]",
            "list, each a number > 0",
            ", ".join(f"{rate:g}" for rate in LADDER_RATES),
        ),
    ] = None
    key: Annotated[str, doc("Configuration key of the learning rate.", "model.groups.lr")] = (
        "model.optimizer.init_args.lr"
    )


class SizeKeys(DesignKeys, frozen=True, kw_only=True):
    """Options of a ladder of sizes."""

    levels: Annotated[
        YamlNode,
        doc(
            "Sizes: the changed keys of each. The first one is the reference.",
            "{w32: {model.backbone.init_args.dim: 32}, w64: {}}",
            "mapping of names to changes, at least two",
        ),
    ]


class CureKeys(DesignKeys, frozen=True, kw_only=True):
    """Options of a cure study."""

    illness: Annotated[
        tuple[ConfigFile, ...],
        doc("Overlays that make the model sick. Later files win.", "[conf/illnesses/attention_logits.yaml]"),
    ]
    dose: Annotated[
        Changes | None, doc("Changes over the overlays: how sick.", "{model.optimizer.init_args.lr: 2.0e-2}")
    ] = None
    signs: Annotated[tuple[Metric, ...], doc("Metrics that show the illness.", "[attention_logit_max/block0]")] = ()
    all: Annotated[
        YamlNode | None,
        doc("Cures that are combined in the arm `sick__all`.", "[qk_norm, clip_norm]", _CURES, "every cure"),
    ] = None
    all_but: Annotated[
        YamlNode | None, doc("Cures that are left out of `all`, one at a time.", "[qk_norm]", _CURES, "each of `all`")
    ] = None
    together: Annotated[
        YamlNode | None,
        doc("Further combinations.", "[[qk_norm, clip_norm]]", "list of lists of cures"),
    ] = None
    on_healthy: Annotated[
        YamlNode | None,
        doc("Cures to try on the healthy model, for side effects and cost.", "[clip_norm]", _CURES, "every cure"),
    ] = None
    recommendations: Annotated[
        YamlNode | None,
        doc(
            "Cures that a source names against this illness. The matrix marks them, and tells which others work.",
            "{qk_norm: 'ViT-22B, arXiv 2302.05442'}",
            "mapping of a cure to its source, or {} for none",
            "not said",
        ),
    ] = None
    fresh_seeds: Annotated[
        tuple[Seed, ...],
        doc("Seeds on which `moevlm sweep run FOLDER` repeats the strongest cells of the matrix.", "[10, 11, 12]"),
    ] = ()
    fresh_arms: Annotated[
        YamlNode | None,
        doc(
            "Sick arms that are repeated on `fresh_seeds` in any case. Name them before those seeds run. Where the "
            "first seeds leave such an arm unclear, the fresh ones decide.",
            "[sick__qk_norm]",
            "list of arms",
            "none",
        ),
    ] = None


class ProductKeys(Record, frozen=True):
    """A product has no options: it lists its parts."""


@dataclass(frozen=True)
class DesignPage:
    """One design."""

    kind: Kind
    arms: str  # the arms that it makes
    takes: str  # the factors that it takes
    example: str  # YAML
    options: type[Record]  # the keys below its name


_SWITCHES, _ANY = "switches (`on`, `off`)", "switches and factors with `levels`"
_PAGES = (
    DesignPage(
        "one_in", "The reference, and each factor alone at each other of its levels.", _ANY, "one_in", DesignKeys
    ),
    DesignPage("leave_one_out", "All switches on, and each one off.", _SWITCHES, "leave_one_out", DesignKeys),
    DesignPage(
        "factorial",
        "All combinations of switches, 2^k.",
        _SWITCHES,
        "{factorial: {factors: [qk_norm, router_z]}}",
        DesignKeys,
    ),
    DesignPage(
        "fractional_factorial",
        "A part of all combinations that still tells main effects apart. `sweep plan` prints its aliases.",
        _SWITCHES,
        "{fractional_factorial: {resolution: 4}}",
        FractionKeys,
    ),
    DesignPage("grid", "All combinations of factors with any number of levels.", _ANY, "grid", DesignKeys),
    DesignPage(
        "lr_sensitivity",
        "All combinations at every learning rate of a ladder (arXiv 2309.14322). Brings the factor `lr`.",
        _ANY,
        "{lr_sensitivity: {rates: [1.0e-3, 1.0e-2, 1.0e-1]}}",
        RateKeys,
    ),
    DesignPage(
        "size_ladder",
        "All combinations at every size. Brings the factor `size`.",
        _ANY,
        "{size_ladder: {levels: {w32: {model.backbone.init_args.dim: 32}, w64: {}}}}",
        SizeKeys,
    ),
    DesignPage(
        "product",
        "Every arm of one design with every arm of another.",
        "a list of designs, each naming its factors",
        "{product: [{leave_one_out: {factors: [a, b]}}, {lr_sensitivity: {factors: []}}]}",
        ProductKeys,
    ),
    DesignPage(
        "cures",
        "A healthy and a sick model: the sick one with each cure, with all and with all but one; the healthy one with "
        "each cure. `moevlm sweep matrix` draws the matrix of several such studies.",
        "switches, the cures",
        "{cures: {illness: [conf/overlays/no_balance_loss.yaml]}}",
        CureKeys,
    ),
)
DESIGNS: dict[Kind, DesignPage] = {page.kind: page for page in _PAGES}
assert tuple(DESIGNS) == KINDS
