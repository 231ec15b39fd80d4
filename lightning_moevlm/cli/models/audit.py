"""`moevlm audit`: one page about the routing of a model of transformers, without training it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.atomic_files import check_writable_file, explain_write_errors, write_atomically
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.model.backbones.adopted.build import DType

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def audit(
    path: str | None = None,
    configuration: str | None = None,
    data: str | None = None,
    texts: str | None = None,
    num_samples: int = 64,
    batch_size: int = 8,
    image_size: int | None = None,
    max_text_len: int = 64,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    local_files_only: bool = True,
    out: str | None = None,
    json: str | None = None,
) -> None:
    """Audit the routing of a mixture-of-experts model of Hugging Face, without training: moevlm audit PATH.

    Finds routers, asks the model what its balance loss does to them, and measures loads on a sample.

    Args:
        path: Directory that save_pretrained wrote, or the name of a model in the local cache of the hub.
        configuration: A model with random weights instead of a path: a file or a mapping with model_type and
            sizes, as HuggingFaceModel takes them, or a configuration of moevlm fit with such a backbone.
        data: Set of shards whose training split is the sample, or its address; by default drawn scenes with captions.
        texts: File with one text per line as the sample instead.
        num_samples: Largest number of samples.
        batch_size: Samples of a forward pass, an even number. The loss is computed on the first ones.
        image_size: Pixels, height and width; by default what the vision tower is made for.
        max_text_len: Tokens; longer texts are cut.
        dtype: Of weights and computation.
        device: Where the model runs.
        local_files_only: Never fetch; false fetches PATH from the hub.
        out: File of the page; by default audit_NAME.html in this folder.
        json: Write the record to this file as JSON instead of the page; - is standard output.
    """
    from lightning_moevlm.cli.models.audit_page import make_tables, render_page, write_finding, write_record
    from lightning_moevlm.cli.models.audit_sample import Wanted, check_source, draw_sample, make_batches
    from lightning_moevlm.common.number_checks import check_number
    from lightning_moevlm.data.storage.local import local_target

    check_number("num_samples", num_samples, least=2)
    check_number("max_text_len", max_text_len, least=2)
    if image_size is not None:
        check_number("image_size", image_size, least=1)
    if batch_size < 2 or batch_size % 2:
        raise UserError(f"batch_size is {batch_size}: choose an even number, since its halves are compared")
    target = local_target(f"audit_{_name(path, configuration)}.html" if out is None else out)
    check_writable_file(target, "out")
    if json not in (None, "-"):
        check_writable_file(Path(json), "json")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device is cuda, and no GPU of this machine is seen: leave --device out")
    built_from, options = _read_config(path, configuration)
    check_source(data, texts)
    model = _open(built_from, options, image_size, max_text_len, dtype, local_files_only)
    from lightning_moevlm.model.backbones.adopted.audit.audit import audit as audit_model

    wanted = Wanted(num_samples, model.spec.image_size if model.images is not None else None)
    sample = draw_sample(data, texts, wanted)
    batches, by = make_batches(model, built_from, sample, batch_size, device)
    found = audit_model(model.to(device), batches)
    said = f"{sample.origin}; ids by {by}"
    finding, tables = write_finding(found), make_tables(found)
    if json is not None:
        show("", [write_record(found, finding, said)], json)
        return
    name = path or f"{found.family} with random weights"
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, render_page(found, name, finding, tables, said))
    from lightning_moevlm.study.report.terminal import print_tables

    terminal = console()
    terminal.print(f"{name}, transformers {found.transformers}", highlight=False, markup=False, style="bold")
    for sentence in finding:
        terminal.print(f"- {sentence}", highlight=False, markup=False)
    terminal.print()
    print_tables(terminal, tables)
    terminal.print(f"Sample: {said}\nPage: {target}", highlight=False, markup=False, soft_wrap=True)


def _open(
    path: str | None,
    config: dict[str, Any] | None,
    image_size: int | None,
    max_text_len: int,
    dtype: "DType",
    local_files_only: bool,
) -> Any:
    """Return the model; what transformers prints about weights and sizes is left to its log level."""
    from lightning_moevlm.model.backbones.adopted.audit.open_model import open_model

    if path is not None and Path(path).is_file():
        raise UserError(f"{path} is a file: give the folder that save_pretrained wrote, or --config {path}")
    if path is not None and not Path(path).is_dir() and not _HUB_NAME.fullmatch(path):
        raise UserError(
            f"{path} is not a folder: give one that save_pretrained wrote, or the name of a model on the hub"
        )
    return open_model(path, config, image_size, max_text_len, dtype, local_files_only)


def _read_config(path: str | None, config: str | None) -> tuple[str | None, dict[str, Any] | None]:
    """Return the path and the configuration that the model is built from, of which one is None."""
    import yaml

    from lightning_moevlm.common.yaml_text import read_yaml

    if (path is None) == (config is None):
        raise UserError("moevlm audit takes either a PATH or --config; see --help")
    if config is None:
        return path, None
    try:
        content = read_yaml(config if _is_mapping(config) else Path(config).read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {config} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {config} holds no mapping: give {{model_type: olmoe, ...}} or a file with one")
    backbone = _mapping(_mapping(content.get("model")).get("backbone"))
    if "model_type" not in content and backbone:
        if str(backbone.get("class_path")).rpartition(".")[2] != "HuggingFaceModel":
            raise UserError(
                f"--config {config} has the backbone {backbone.get('class_path')}, and moevlm audit is for "
                "HuggingFaceModel; of the others moevlm fit writes receipts and loads"
            )
        given = _mapping(backbone.get("init_args"))
        if given.get("upcycle") is not None:
            raise UserError(
                f"--config {config} makes mixtures of ours by model.backbone.upcycle, and moevlm audit is for "
                "routers of transformers; of the others moevlm fit writes receipts and loads"
            )
        directory = given.get("path")
        return None if directory is None else str(directory), _mapping(given.get("config")) or None
    return None, content


def _mapping(value: Any) -> dict[str, Any]:
    """Return a part of a configuration, which a user may have written as anything."""
    return value if isinstance(value, dict) else {}


def _is_mapping(config: str) -> bool:
    return config.lstrip().startswith("{")


def _name(path: str | None, config: str | None) -> str:
    """Return a name for files."""
    given = path or config
    last = "config" if given is None or _is_mapping(given) else Path(given).absolute().name
    return re.sub(r"[^\w.-]+", "_", last.removesuffix(".yaml").removesuffix(".json"))
