"""Builds a model of transformers: from a directory, from the hub, or with random weights from a configuration."""

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_moevlm.common.errors import UserError, say_missing_package
from lightning_moevlm.common.nearest_name import find_nearest

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
ExpertsBackend: TypeAlias = Literal["eager", "grouped_mm", "batched_mm"]
_LONGEST_CAUSE = 300  # characters


@dataclass(frozen=True)
class Origin:
    """Where a model comes from and how it computes; see `HuggingFaceModel`."""

    path: str | None
    config: dict[str, Any] | None
    dtype: DType
    attention: str | None
    experts_backend: ExpertsBackend | None
    local_files_only: bool
    vocab_size: int


def build(origin: Origin) -> nn.Module:
    """Return the model; one from a configuration has no weights yet, see `draw`.

    Raises:
        UserError: transformers is missing, or it cannot build the model.
    """
    config = read_config(origin)
    import transformers
    from transformers.initialization import no_init_weights

    with _explained(origin), torch.random.fork_rng(devices=[]):
        sees = hasattr(config, "vision_config")
        loader = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": getattr(torch, origin.dtype), "attn_implementation": origin.attention}
        if origin.path is not None and torch.get_default_device().type != "meta":
            model, found = loader.from_pretrained(
                origin.path,
                config=config,
                local_files_only=origin.local_files_only,
                output_loading_info=True,
                **options,
            )
            _refuse_missing(origin.path, model, found["missing_keys"])
        else:
            with no_init_weights():  # see `draw`
                model = loader.from_config(config, **options)
        if origin.experts_backend is not None:
            # wrappers such as LLaVA's refuse back-ends that their language models take
            model.get_decoder().set_experts_implementation(origin.experts_backend)
    assert isinstance(model, nn.Module)
    return model.train()  # loaded ones are in evaluation mode, in which transformers checkpoints no layer


def read_config(origin: Origin) -> Any:
    """Return the configuration as transformers has it, with ids of images after those of the data.

    Raises:
        UserError: transformers is missing, or it does not know the model.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "HuggingFaceModel needs transformers, which is not installed: pip install 'lightning-moevlm[hf]'"
        ) from error
    if (origin.path is None) == (origin.config is None):
        raise UserError(
            "HuggingFaceModel needs either `path`, a directory or the name of a model on the hub, or `config` with "
            "model_type and sizes: set one of them, and the other to null"
        )
    with _explained(origin):
        return _read_config(transformers, origin)


def _refuse_missing(path: str, model: Any, missing: Iterable[str]) -> None:
    """Refuse files that lack weights, which transformers would draw at random with a warning."""
    names = sorted(missing)
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"the files in {path} lack {names[0]}{others}, and {type(model).__name__} would draw them at random: give "
            "the whole directory of one model"
        )


def draw(model: Any, seed: int) -> None:
    """Draw random weights by the model's own rule; the same for one seed on every machine."""
    for path, module in model.named_modules():
        for each in (*module.parameters(recurse=False), *module.buffers(recurse=False), module):
            if "lora_" in path:  # adapters have a rule of their own, and were drawn by it
                each._is_hf_initialized = True
            elif hasattr(each, "_is_hf_initialized"):
                del each._is_hf_initialized
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    model.tie_weights()


def takes(function: Any, name: str) -> bool:
    """Return whether a method has an argument of this name."""
    return name in inspect.signature(function).parameters


def _read_config(transformers: Any, origin: Origin) -> Any:
    if origin.path is not None:
        where = {"local_files_only": origin.local_files_only}
        options, _ = transformers.PreTrainedConfig.get_config_dict(origin.path, **where)
        model_type = options.get("model_type")
        if "auto_map" in options and model_type not in transformers.CONFIG_MAPPING:
            raise UserError(
                f"the path {origin.path} is of the model_type {model_type}, whose code lies beside its weights and is "
                "not run: name a model of transformers itself; a run of yours that was exported goes on from its "
                "checkpoint, model.init_from"
            )
        return transformers.AutoConfig.from_pretrained(origin.path, trust_remote_code=False, **where)
    assert origin.config is not None
    options = dict(origin.config)
    if "model_type" not in options:
        raise UserError("model.backbone.config has no model_type: name a family, such as qwen3_vl_moe or olmoe")
    model_type = options.pop("model_type")
    text = options["text_config"] = dict(options["text_config"]) if "text_config" in options else options
    if text is options:
        del options["text_config"]
    if "vision_config" in options:
        # ids after those of the tokenizer stand for images
        for place, name in enumerate(_IMAGE_IDS):
            options.setdefault(name, origin.vocab_size + place)
    text.setdefault("vocab_size", origin.vocab_size + (len(_IMAGE_IDS) if "vision_config" in options else 0))
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(options))
    _refuse_unknown(transformers, config, origin.config, "")
    return config


def _refuse_unknown(transformers: Any, config: Any, options: Mapping[str, Any], prefix: str) -> None:
    """Refuse keys that the configuration lacks and no file of its family names, which transformers would ignore."""
    for name, value in options.items():
        part = vars(config).get(name)
        if str(getattr(part, "model_type", "")).startswith("timm"):  # hands what it does not know to timm
            continue
        if isinstance(value, Mapping) and isinstance(part, transformers.PreTrainedConfig):
            _refuse_unknown(transformers, part, value, f"{prefix}{name}.")
            continue
        fields = [field.name for field in dataclasses.fields(config)]
        knows = name in fields or name.endswith("_token_id")  # ids that only generation may read
        if not knows and not re.search(
            rf"\b{re.escape(name)}\b", _sources(transformers.__file__, inspect.getfile(type(config)))
        ):
            near = find_nearest(name, fields)
            raise UserError(
                f"model.backbone.config.{prefix}{name} is no option of {type(config).__name__} and would change nothing"
                f"{'' if near is None else f'; did you mean {near}?'}"
            )


@cache
def _sources(package: str, configuration: str) -> str:
    """Return the files that read a configuration: those of its family, and those that all families share."""
    root = Path(package).parent
    shared = [root / name for name in ("configuration_utils.py", "modeling_rope_utils.py", "backbone_utils.py")]
    files = [*Path(configuration).parent.glob("*.py"), *shared]
    return "\n".join(file.read_text("utf-8") for file in files if file.is_file())


_IMAGE_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@contextmanager
def _explained(origin: Origin) -> Iterator[None]:
    """Turn what transformers says of a wrong path or option into one message."""
    what = f"config of {origin.config.get('model_type')}" if origin.config is not None else f"path {origin.path}"
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files of weights and checks of options raise classes of their own libraries
        missing = say_missing_package(error)
        if missing is not None:
            raise UserError(f"the {what} {missing}") from error
        lines = " ".join(str(error).split("\n")[:2])
        said = shorten(lines, _LONGEST_CAUSE, placeholder=" ...")  # of an unknown family all known ones are named
        is_remote = origin.path is not None and not Path(origin.path).exists()
        advice = (
            "; to fetch it from the hub, set local_files_only to false"
            if is_remote and origin.local_files_only and isinstance(error, OSError)
            else ""
        )
        raise UserError(f"transformers cannot build the {what}: {type(error).__name__}: {said}{advice}") from error
