"""Other packages' private interfaces, and texts that they print, on which this package relies: one table of each.

Each listed one must exist in the installed versions, so that an upgrade fails here and not in a run. Each use must be
listed.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_moevlm"

# Private name, by file: where it is defined, as `module:Class` or `module`.
INTERFACES = {
    "cli/training.py": {
        "_parse_ckpt_path": "lightning.pytorch.cli:LightningCLI",
        "_parser": "lightning.pytorch.cli:LightningCLI",
        "_prepare_subcommand_parser": "lightning.pytorch.cli:LightningCLI",
        "_run_subcommand": "lightning.pytorch.cli:LightningCLI",
    },
    "configuration/parsers.py": {"_cleanups": "typing", "_typehint": "jsonargparse._typehints:ActionTypeHint"},
    "configuration/reference_parser.py": {"_check_value_key": "jsonargparse:ArgumentParser"},
    "data/images/allocation.py": {"_new_shared": "torch:UntypedStorage"},
    "data/images/decode.py": {"_upsample_bilinear2d_aa": "torch:ops.aten"},
    "model/backbones/adopted/routing/_adopted_moe.py": {
        "_experts_implementation": "transformers.configuration_utils:PreTrainedConfig"
    },
    "model/backbones/adopted/routing/_their_backend.py": {"_apply_gate": "transformers.integrations.moe"},
    "model/backbones/adopted/routing/our_dispatch.py": {
        "_experts_implementation": "transformers.configuration_utils:PreTrainedConfig"
    },
    "model/backbones/adopted/routing/adopt.py": dict.fromkeys(
        ("_device_mesh", "_tp_size"), "transformers.modeling_utils:PreTrainedModel"
    ),
    "model/dispatch/padded.py": {"_assert_async": "torch"},
    "model/precision/simulated.py": {"_C": "torch", "_pytree": "torch.utils"},
    "model/routers/router.py": {"_parameters": "torch.nn:Module"},
    "tracking/write/rewind.py": {"_metric_objs": "mlflow.entities:RunData"},
    "tracking/write/run_logger.py": dict.fromkeys(
        ("_artifact_location", "_experiment_id", "_run_id", "_run_name", "_tracking_uri"),
        "lightning.pytorch.loggers:MLFlowLogger",
    ),
    "training/callbacks/liveness/loss_proofs.py": {"_foreach_norm": "torch"},
    "training/callbacks/recording/flight_recorder.py": {"_get_scale_async": "torch.amp:GradScaler"},
    "training/callbacks/recording/step_values.py": {"_foreach_norm": "torch"},
    "training/callbacks/stopping/divergence_guard.py": {
        "_should_accumulate": "lightning.pytorch.loops.fit_loop:_FitLoop"
    },
    "training/callbacks/stopping/last_checkpoint.py": {
        "_last_global_step_saved": "lightning.pytorch.callbacks:ModelCheckpoint",
        "_monitor_candidates": "lightning.pytorch.callbacks:ModelCheckpoint",
        "_save_last_checkpoint": "lightning.pytorch.callbacks:ModelCheckpoint",
        "_should_accumulate": "lightning.pytorch.loops.fit_loop:_FitLoop",
    },
    "training/callbacks/stopping/stop_by_signal.py": {
        "_should_accumulate": "lightning.pytorch.loops.fit_loop:_FitLoop",
        "_signal_connector": "lightning.pytorch:Trainer",
    },
    "training/callbacks/telemetry.py": {"_foreach_sub": "torch"},
    "training/checks/optimizer_checks.py": {"_step_supports_amp_scaling": "torch.amp:GradScaler"},
    "training/half_precision.py": {"_keep_in_fp32_modules_strict": "transformers.modeling_utils:PreTrainedModel"},
    "training/optim/gradients/clip_update.py": {"_foreach_sub": "torch"},
    "training/optim/gradients/gradient_control.py": {"_foreach_mul_": "torch"},
    "training/optim/gradients/gradient_norms.py": {"_foreach_norm": "torch"},
    "training/optim/gradients/undoable_step.py": {"_step_supports_amp_scaling": "torch.amp:GradScaler"},
    "training/optim/optimizers/lion.py": dict.fromkeys(
        ("_foreach_add_", "_foreach_lerp", "_foreach_lerp_", "_foreach_mul_", "_foreach_sign_"), "torch"
    ),
    "training/optim/optimizers/muon.py": dict.fromkeys(("_foreach_lerp", "_foreach_lerp_", "_foreach_mul_"), "torch"),
    "training/optim/optimizers/optimizer_step.py": dict.fromkeys(
        ("_foreach_add_", "_foreach_addcmul_", "_foreach_lerp_", "_foreach_mul_"), "torch"
    ),
    "training/optim/optimizers/stable_adamw.py": dict.fromkeys(
        (
            *("_foreach_add_", "_foreach_clamp_min", "_foreach_div", "_foreach_div_"),
            *("_foreach_neg_", "_foreach_pow", "_foreach_sqrt_"),
        ),
        "torch",
    ),
    "training/optim/tensor_roles.py": {"_foreach_norm": "torch"},
    "training/unused_parameters.py": {"_ddp_kwargs": "lightning.pytorch.strategies:DDPStrategy"},
    "training/vision_language_module.py": {"_trainer": "lightning.pytorch:LightningModule"},
}

# Parts of texts, by the module that prints them, that `configuration/messages/` reads.
PARSED = {
    "jsonargparse._typehints": (
        'Parser key "',
        "Problem with given class_path",
        "expects a function or a callable class",
        "Expected a path but",
        "either not accessible or invalid",
        "Does not validate against any of the Union subtypes",
        "Given value:",
        "Got value:",
        "Subclass types expect one of:",
        "to be a subclass of",
        "a function that returns",
        "Subclasses are disabled for",
        "Not a valid subclass",
    ),
    "jsonargparse._util": ("Expected a dot import path string", "Unexpected import path format"),
    "jsonargparse._core": ("does not accept option", "Option '", "nrecognized arguments"),
    "jsonargparse._subcommands": ("to be one of", "but it was not provided"),
    "argparse": ("expected one argument", "invalid choice: ", "the following arguments are required: "),
}

# Warnings of other packages that are filtered by a part of their text, by the module that gives them.
FILTERED = {
    r".*isinstance\(treespec, LeafSpec\).*": "torch.utils._pytree",
    r".*does not have many workers.*": "lightning.pytorch.trainer.connectors.data_connector",
    r".*The number of training batches.*smaller than the logging interval.*": "lightning.pytorch.loops.fit_loop",
    r".*The dirpath has changed from.*": "lightning.pytorch.callbacks.model_checkpoint",
    r".*Checkpoint directory .* exists and is not empty.*": "lightning.pytorch.callbacks.model_checkpoint",
    r".*callbacks used to create the checkpoint need to be provided.*": "lightning.pytorch.trainer.call",
    r".*It is recommended to use .*sync_dist=True.*": "lightning.pytorch.trainer.connectors.logger_connector.result",
    r".*Couldn't infer the batch indices.*": "lightning.pytorch.loops.prediction_loop",
    r"Detected call of `lr_scheduler\.step\(\)`": "torch.optim.lr_scheduler",
}

_DOCUMENTED = {"os._exit"}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in INTERFACES.items() for name in names])
def test_what_is_listed_exists(file: str, name: str) -> None:
    module, _, path = INTERFACES[file][name].partition(":")
    if module.startswith("transformers."):
        pytest.importorskip("transformers", reason="of the extra hf")
    owner = importlib.import_module(module)
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    if not hasattr(owner, name):  # set on objects, by a method
        assert re.search(rf"[.\"']{name}\b", inspect.getsource(owner)), f"{module} no longer has {name}"


def test_what_is_used_is_listed() -> None:
    used = {(file, name) for file, tree in _trees().items() for name in _foreign_names(tree)} | set(_foreign_members())
    listed = {(file, name) for file, names in INTERFACES.items() for name in names}
    assert sorted(used - listed) == [], "not listed in INTERFACES"
    assert sorted(listed - used) == [], "no longer used"


@pytest.mark.parametrize(("module", "part"), [(module, part) for module, parts in PARSED.items() for part in parts])
def test_a_text_that_is_parsed_is_printed(module: str, part: str) -> None:
    assert part in _texts(module)


@pytest.mark.parametrize("pattern", FILTERED)
def test_a_warning_that_is_filtered_is_given(pattern: str) -> None:
    for part in pattern.split(".*"):
        assert re.sub(r"\\(.)", r"\1", part) in _texts(FILTERED[pattern])


def test_every_filter_of_warnings_is_listed() -> None:
    calls = [
        node
        for tree in _trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _dotted(node.func) == "warnings.filterwarnings"
    ]
    patterns = [ast.literal_eval(word.value) for call in calls for word in call.keywords if word.arg == "message"]
    assert sorted(patterns) == sorted(FILTERED)


def test_the_parser_is_bounded_by_its_minor_version() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    [bound] = re.findall(r'"jsonargparse\[.*\]>=4\.(\d+),<4\.(\d+)"', text)
    assert int(bound[1]) == int(bound[0]) + 1


@cache
def _trees() -> dict[str, ast.Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in files}


@cache
def _own_names() -> set[str]:
    """Return every name that the package itself gives to anything, or gets with its named tuples."""
    names = {"_replace", "_asdict", "_fields", "_make"}
    for tree in _trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
    return names


def _is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def _foreign_names(tree: ast.Module) -> Iterator[str]:
    """Yield private names that a file imports from other packages, or reads from objects and never gives itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            is_ours = node.attr in _own_names() or _dotted(node) in _DOCUMENTED
            yield from () if is_ours else (node.attr,)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("lightning_moevlm"):
            words = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from filter(_is_private, words)
        elif isinstance(node, ast.Import):
            yield from (word for alias in node.names for word in alias.name.split(".") if _is_private(word))
        elif isinstance(node, ast.Call) and _dotted(node.func) == "getattr":
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            yield from (str(name),) if _is_private(name) else ()


def _foreign_members() -> Iterator[tuple[str, str]]:
    """Yield private members of other packages' classes that a class of ours below them overrides or uses."""
    for file, tree in _trees().items():
        named = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
        if not named or file in _NOT_IMPORTED:
            continue
        module = importlib.import_module(".".join(["lightning_moevlm", *Path(file).with_suffix("").parts]))
        for node in named:
            bases = getattr(module, node.name).__mro__
            foreign = [base for base in bases if base.__module__.partition(".")[0] in _FRAMEWORKS]
            private = {name for base in foreign for name in _members(base)}
            yield from ((file, name) for name in _own_members(node) & private)


_NOT_IMPORTED = ("__main__.py", "model/backbones/adopted/export/modeling_moevlm.py")
"""The second one is written beside weights, and loaded from there."""

_FRAMEWORKS = ("lightning", "torch", "jsonargparse", "mlflow", "transformers", "webdataset", "torchmetrics")


@cache
def _members(cls: type) -> frozenset[str]:
    """Return the private names of a class and of its objects."""
    source = "" if cls.__module__ == "torch._C" else inspect.getsource(cls)  # which is not Python
    on_objects = re.findall(r"self\.(_[a-z]\w*)\b(?:: [^=\n]+)? = ", source)
    return frozenset({*filter(_is_private, vars(cls)), *on_objects})


def _own_members(cls: ast.ClassDef) -> set[str]:
    functions = {node.name for node in ast.walk(cls) if isinstance(node, ast.FunctionDef)}
    attributes = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and (_dotted(node.value) in ("self", "cls") or _is_super(node.value))
    }
    return set(filter(_is_private, functions | attributes))


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and not node.args and _dotted(node.func) == "super"


def _dotted(node: ast.expr) -> str:
    """Return a dotted name; "" for any other expression. `ast.unparse` takes a hundred times as long."""
    if isinstance(node, ast.Name):
        return node.id
    owner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner and isinstance(node, ast.Attribute) else ""


@cache
def _texts(module: str) -> str:
    """Return every text of a module, with gaps where it inserts values."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return "\n".join(
        "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )
