"""`moevlm list` and `moevlm describe`: the parts of configurations, and the keys of study files."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = Literal[
    "backbones",
    "layers",
    "routers",
    "experts",
    "dispatchers",
    "losses",
    "actions",
    "objectives",
    "image_targets",
    "options",
    "optimizers",
    "stabilisers",
    "schedules",
    "callbacks",
    "designs",
    "metrics",
]

_PLACEHOLDERS = (
    "stage: train, val or test. term: a loss term, as image or router_z. block: 0, 1, ... modality: image or text.\n"
    "expert: 0, 1, ... switch: an option, such as losses.router_z. source: a name in data.sources."
)


def list_parts(kind: Kind | None = None, json: str | None = None) -> None:
    """List parts for configurations, plug-ins included, and designs and metrics for studies: moevlm list [KIND].

    Args:
        kind: Kind to list, with what each part is; by default the names of all kinds.
        json: Write the rows to this file as JSON; - is standard output.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lightning_moevlm.cli.output import show

    of_studies = {"designs": design_rows, "metrics": metric_rows}
    rows = [
        {"kind": name, "name": part.__name__, "class_path": class_path(part), "summary": summary(part)}
        for name, parts in ({} if kind in of_studies else _parts()).items()
        if kind in (None, name)
        for part in parts
    ]
    rows += [row for name, make in of_studies.items() if kind in (None, name) for row in make()]
    if kind is None:
        show(_overview(rows), rows, json)
        return
    table = Table("name", "what it is")
    for row in rows:
        table.add_row(row["name"], Text(row["summary"]))
    show(Group(Text(_PLACEHOLDERS), table) if kind == "metrics" else table, rows, json)


def _overview(rows: Sequence[Mapping[str, str]]) -> "RenderableType":
    """Return the names of every kind; of metrics, which are many and long, only their number."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["kind"], []).append(row["name"])
    table = Table("kind", "parts")
    for kind, parts in names.items():
        table.add_row(kind, Text(f"{len(parts)} keys" if kind == "metrics" else ", ".join(parts)))
    return Group(table, Text("`moevlm list KIND` says what each is; `moevlm describe NAME` explains one."))


def describe(name: str | None = None, configs: list[str] | None = None, json: str | None = None) -> None:
    """Describe one part, or the costs of a configuration: moevlm describe NAME, moevlm describe -c FILE.

    Args:
        name: Class name or design as in `moevlm list`, the full path of a class, or study for the keys of a study file.
        configs: A configuration as of `moevlm fit -c` whose parameters, FLOPs and activations are counted;
            may be repeated.
        json: Write the rows to this file as JSON; - is standard output.
    """
    if (name is None) == (not configs):
        raise UserError("moevlm describe takes either a NAME or configurations, -c FILE; see --help")
    if name is None:
        _describe_costs(configs or [], json)
    else:
        _describe_part(name, json)


def _describe_costs(files: Sequence[str], json: str | None) -> None:
    from rich.table import Table

    from lightning_moevlm.cli.output import show
    from lightning_moevlm.configuration.resolver import ConfigResolver, build_without_memory
    from lightning_moevlm.study.report.tables.table import NOTHING, format_count
    from lightning_moevlm.training.step.step_costs import compute_step_costs, list_costs

    resolved = ConfigResolver()([Path(file) for file in files], {})
    module = build_without_memory(resolved, complete=True)
    trainer, data = resolved["trainer"], resolved["data"]
    assert isinstance(trainer, dict) and isinstance(data, dict)
    precision = str(trainer.get("precision") or "32-true")
    spec, pairs = module.backbone.spec, data["batch_size"]
    rows = list_costs(compute_step_costs(module.backbone, module.objective, pairs, precision))
    names = f"{type(module.backbone).__name__} with {type(module.objective).__name__}"
    sizes = f"pairs of {spec.num_patches} patches and {spec.max_text_len} tokens, {pairs} in a batch, {precision}"
    table = Table("cost", "value", "unit", "per token", "what is counted", title=f"{names}: {sizes}")
    for row in rows:
        counts = [NOTHING if number is None else format_count(number) for number in (row.value, row.per_token)]
        table.add_row(row.cost, counts[0], row.unit, counts[1], row.meaning)
    show(table, [row._asdict() for row in rows], json)


def _describe_part(name: str, json: str | None) -> None:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lightning_moevlm.cli.output import show
    from lightning_moevlm.common.nearest_name import find_nearest

    page = page_of(name)
    if page is not None:
        show(*page, json)
        return
    known = {part.__name__: part for parts in _parts().values() for part in parts}
    part = known.get(name) or next((part for part in known.values() if class_path(part) == name), None)
    if part is None and name.split(".")[0] in ("data", "model", "trainer"):
        raise UserError(_explain_key(name, list(known)))
    part = part or _imported(name)
    if part is None:
        near = find_nearest(name, [*known, *names()])
        hint = (
            f"did you mean {near}?" if near else "`moevlm list` shows all, and a class of your own needs its full path"
        )
        raise UserError(f"there is no part {name}: {hint}")
    rows = [
        {
            "option": parameter.name,
            "type": inspect.formatannotation(parameter.annotation),
            "default": None if parameter.default is inspect.Parameter.empty else repr(parameter.default),
        }
        for parameter in inspect.signature(part).parameters.values()
    ]
    table = Table("option", "type", "default")
    for row in rows:
        # brackets are part of a type: rich would take those of Callable[[int, int], Router] for its markup
        given = row["default"] or "required, or given by the model"
        table.add_row(row["option"], Text(str(row["type"])), Text(given))
    module = inspect.getmodule(part)
    texts = [class_path(part), inspect.getdoc(module) or "", inspect.getdoc(part) or ""]
    show(Group(Text("\n\n".join(text for text in texts if text)), Text(""), table), rows, json)


def _explain_key(key: str, names: Sequence[str]) -> str:
    last = key.rpartition(".")[2].replace("_", "").lower()
    part = next((each for each in names if each.lower() == last), None)
    advice = f"`moevlm describe {part}` describes it" if part else "`moevlm fit --help` describes keys"
    return f"{key} is a key, not a class; {advice}"


def _imported(path: str) -> type | None:
    """Return the class of a dotted path; None for a name without dots."""
    from importlib import import_module

    from lightning_moevlm.configuration.messages.parse_errors import explain_missing_module

    module, _, name = path.rpartition(".")
    if not module:
        return None
    try:
        part = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(explain_missing_module(str(error.name))) from error
    if not inspect.isclass(part):
        raise UserError(f"{module} has no class {name}; give the full path of one, package.module.Class")
    return part


def class_path(part: type) -> str:
    """Return the path that a configuration names the class by: the outermost package that exports it."""
    words = part.__module__.split(".")
    modules = [".".join(words[:depth]) for depth in range(1, len(words))]
    exporting = (name for name in modules if getattr(sys.modules.get(name), part.__name__, None) is part)
    return f"{next(exporting, part.__module__)}.{part.__qualname__}"


def summary(part: type) -> str:
    """Return the first sentence of the docstring."""
    return (inspect.getdoc(part) or "").split("\n\n")[0].replace("\n", " ")


def _parts() -> dict[str, list[type]]:
    from dataclasses import fields
    from typing import get_args, get_type_hints

    from lightning.pytorch import Callback
    from torch.optim import AdamW, Optimizer

    import lightning_moevlm.training.callbacks as callbacks
    import lightning_moevlm.training.optim as optim
    from lightning_moevlm.atlas.live import ExpertRoles
    from lightning_moevlm.configuration.plugins import load_plugins
    from lightning_moevlm.contracts.schedules import Ramp
    from lightning_moevlm.model.backbones import Backbone
    from lightning_moevlm.model.dispatch import Capacity, Dispatcher, ModalityFactors
    from lightning_moevlm.model.experts import ExpertInit, ExpertStack, FreeExperts
    from lightning_moevlm.model.layers import FeedForward, ModelStabilisers
    from lightning_moevlm.model.losses import OWN_LOSSES, AuxiliaryLosses, RoutingLoss
    from lightning_moevlm.model.losses.weights import ByOverflow, BySparsity
    from lightning_moevlm.model.objectives import ImageTargets, Objective
    from lightning_moevlm.model.objectives.masked_modelling import MaskRatios, TermWeights
    from lightning_moevlm.model.precision import PrecisionPolicy
    from lightning_moevlm.model.routers import SMEBU, Gate, QuantileUpdate, Router
    from lightning_moevlm.training import Actions

    load_plugins()
    hints, action_hints = get_type_hints(AuxiliaryLosses), get_type_hints(Actions)
    return {
        "backbones": _leaves(Backbone),
        "layers": _leaves(FeedForward),
        "routers": _leaves(Router),
        "experts": _leaves(ExpertStack),
        "dispatchers": _leaves(Dispatcher),
        "losses": [*(get_args(hints[name])[0] for name in OWN_LOSSES), *_leaves(RoutingLoss)],
        "actions": [get_args(action_hints[entry.name])[0] for entry in fields(Actions)],
        "objectives": _leaves(Objective),
        "image_targets": _leaves(ImageTargets),
        "options": [
            ByOverflow,
            BySparsity,
            Capacity,
            ExpertInit,
            FreeExperts,
            Gate,
            optim.GroupOptions,
            MaskRatios,
            ModalityFactors,
            ModelStabilisers,
            PrecisionPolicy,
            QuantileUpdate,
            Ramp,
            SMEBU,
            TermWeights,
        ],
        "optimizers": [AdamW, optim.Hyperball, optim.Lion, optim.MuonAdamW, optim.StableAdamW, *_offered(Optimizer)],
        "stabilisers": [optim.AdaGC, optim.GradientStabilisers, optim.SkipSpikes, optim.ZClip],
        "schedules": _leaves(optim.WarmupSchedule),
        "callbacks": [*(getattr(callbacks, name) for name in callbacks.__all__), ExpertRoles, *_offered(Callback)],
    }


def _offered(base: type) -> list[type]:
    """Return plug-ins' concrete classes below an interface of torch or Lightning, by name."""
    from importlib.metadata import entry_points

    from lightning_moevlm.configuration.plugins import PLUGIN_GROUP

    packages = {entry.module.split(".")[0] for entry in entry_points(group=PLUGIN_GROUP)}
    return [part for part in _leaves(base) if part.__module__.split(".")[0] in packages]


def _leaves(base: type) -> list[type]:
    """Return every concrete class below an interface, by name; not those of modules that begin with an underscore."""
    children: list[type] = base.__subclasses__()
    found = {
        part
        for child in children
        for part in (child, *_leaves(child))
        if not inspect.isabstract(part) and "._" not in part.__module__
    }
    return sorted(found, key=lambda part: part.__name__)


STUDY = "study"


def design_rows() -> list[dict[str, str]]:
    """Return a row of `moevlm list` per design of a study."""
    from lightning_moevlm.study.guide import designs

    return [
        {"kind": "designs", "name": page.kind, "class_path": "", "summary": page.arms.rstrip(".")} for page in designs()
    ]


def metric_rows() -> list[dict[str, str]]:
    """Return a row of `moevlm list` per metric that a study can name."""
    from lightning_moevlm.contracts import metric_keys

    return [
        {
            "kind": "metrics",
            "name": metric.pattern,
            "class_path": "",
            "summary": f"{metric.title} ({metric.unit or 'no unit'}, {_better(metric.better)})",
        }
        for metric in metric_keys.ALL
    ]


def names() -> list[str]:
    """Return every name that `describe` takes beside parts."""
    from lightning_moevlm.study.guide import designs

    return [STUDY, *(page.kind for page in designs())]


def page_of(name: str) -> "tuple[RenderableType, list[dict[str, object]]] | None":
    """Return the page and the records of the study file or of a design; None for any other name."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lightning_moevlm.study.declare.decode import describe_keys
    from lightning_moevlm.study.guide import ABOUT, design_text, designs, study_rows

    found = next((page for page in designs() if page.kind == name), None)
    if name != STUDY and found is None:
        return None
    rows = study_rows() if found is None else describe_keys(found.options)
    table = Table("key", "takes", "default", "meaning")
    for row in rows:
        table.add_row(*(Text(cell) for cell in (row.key, row.type, row.default, row.meaning)))
    text = ABOUT if found is None else design_text(found)
    return Group(Text(text), Text(""), table), [dataclasses.asdict(row) for row in rows]


def _better(word: str) -> str:
    return "no better direction" if word == "neither" else f"{word} is better"
