"""`moevlm experts`: which expert serves what, and whether that is more than chance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.cli.runs.expert_sections import Subject, check_parts, find_parts, make_sections
from lightning_moevlm.common.atomic_files import check_writable, check_writable_file, fill_folder
from lightning_moevlm.common.number_checks import check_number

if TYPE_CHECKING:
    from lightning_moevlm.configuration.run_option import TrainedModel
    from lightning_moevlm.data.datamodule import ShardDataModule

_FOLDER = "experts"
"""Of a run's folder and of its artifacts."""


def experts(
    run: str,
    ckpt_path: str = "last",
    config_file: str | None = None,
    data: str | None = None,
    split: Literal["train", "val", "test"] = "val",
    samples: int = 512,
    seed: int = 0,
    draws: int = 999,
    batch_size: int = 32,
    remove: Literal["next", "nothing"] | None = None,
    history: bool = False,
    others: list[str] | None = None,
    out: str | None = None,
    json: str | None = None,
    tracking_uri: str | None = None,
) -> None:
    """Show which expert of a trained model serves what, and whether that is more than chance.

    Args:
        run: Name, id or folder of a run, a checkpoint (.ckpt), or the folder of an exported model.
        ckpt_path: Checkpoint of the run: last, best, or the name of a file.
        config_file: -c FILE or --config FILE, the configuration of the training; needed only for a checkpoint in the
            folder of no run.
        data: Set that the samples are from; by default the data of the run.
        split: Split that the samples are from.
        samples: Samples of the probe.
        seed: Seed of their choice and of the null models.
        draws: Draws of each null model.
        batch_size: Samples of a forward pass.
        remove: Also switch off each expert, and route each layer otherwise, to see which samples need which expert. Its
            tokens go to the next-ranked expert (next) or to none (nothing). Runs the probe once for each.
        history: Also follow routing over the checkpoints of the run. With --remove the model also runs with the choices
            of earlier ones.
        others: A run of another seed (name, id or folder) whose experts are matched to those of this one; may be
            repeated, or a list.
        out: Folder to write; by default experts/ in the folder of the run, or beside the checkpoint.
        json: Write one record per layer and label to this file as JSON instead of the table; - is standard output.
        tracking_uri: MLflow store of the run; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.
    """
    from lightning_moevlm.atlas.make_atlas import make_atlas
    from lightning_moevlm.atlas.page.sentences import describe
    from lightning_moevlm.atlas.page.write_atlas import HTML_FILE, JSON_FILE, TENSORS_FILE, write_atlas
    from lightning_moevlm.atlas.probe.probe_set import ProbeSet
    from lightning_moevlm.configuration.resolver import load_run
    from lightning_moevlm.configuration.run_option import find_trained_model
    from lightning_moevlm.tracking.record.add_files import add_files

    check_number("draws", draws, least=19)
    check_number("batch_size", batch_size, least=1)
    check_number("seed", seed, least=0)
    found = find_trained_model(run, ckpt_path, config_file, tracking_uri)
    asked = find_parts(found, remove, history, others or (), tracking_uri)
    folder = _folder(found) if out is None else Path(out)
    check_writable(folder, "out")
    if json not in (None, "-"):
        check_writable_file(Path(json), "json")
    loaded = load_run(found.checkpoint, found.config)
    probe = ProbeSet(_data(loaded.resolved["data"], data), split, samples, seed)
    about = {
        "run": _name(loaded.resolved, found),
        "checkpoint": found.checkpoint.name,
        "step": int(loaded.checkpoint.get("global_step", 0)),
    }
    command = f"moevlm experts {run} --split {split} --samples {samples} --seed {seed} --draws {draws}"
    with fill_folder(folder) as unfinished:
        subject = Subject(found, loaded, probe, unfinished, batch_size)
        check_parts(asked, subject)
        atlas = make_atlas(subject.backbone, subject.objective, probe, unfinished, draws, batch_size)
        sections = make_sections(asked, subject, atlas)
        write_atlas(atlas, about, command, unfinished, sections)
    rows = atlas.rows()
    show(_table(rows), rows, json)
    if json is None:
        terminal = console()
        told = [line for section in sections for line in section.sentences]
        for line in (*describe(atlas), *told, f"Page: {folder / HTML_FILE}"):
            terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    if found.store is not None and found.folder is not None:
        files = [folder / name for name in (HTML_FILE, JSON_FILE, TENSORS_FILE)]
        add_files(found.store, found.folder.name, files, _FOLDER)


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Return a command line in which -c and --config stand for --config_file, and --others takes a run or a list."""
    full: list[str] = []
    is_run = False
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            full.append(f"--config_file{equals}{value}")
        elif name == "--others" and equals:
            full.append(word if value.startswith("[") else f"--others+={value}")
        elif is_run and not word.startswith("["):
            full[-1:] = ["--others+", word]
        else:
            full.append(word)
        is_run = word == "--others"
    return full


def _name(resolved: Mapping[str, Any], found: "TrainedModel") -> str:
    logger = resolved.get("trainer", {}).get("logger")
    named = (logger.get("init_args") or {}).get("run_name") if isinstance(logger, dict) else None
    return str(named or (found.checkpoint.stem if found.folder is None else found.folder.name))


def _folder(found: "TrainedModel") -> Path:
    if found.folder is not None:
        return found.folder / _FOLDER
    return found.checkpoint.with_name(f"{found.checkpoint.stem}-experts")


def _data(resolved: Mapping[str, Any], root: str | None) -> "ShardDataModule":
    """Return the data of a run; root: another set in their place, of which images and texts alone are read."""
    from lightning_moevlm.configuration.resolver import build_data

    if root is None:
        return build_data(resolved)
    others = {"sources": None, "urls": None, "annotation": None, "append_answer": None, "second_image": None}
    return build_data({**resolved, **others, "root": root})


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    caption = "NMI: normalised mutual information of experts and label, 0 (independent) to 1"
    table = Table(title="What the experts have to do with each label", caption=caption)
    for column in ("layer", "label", "NMI", "by chance", "p", "experts"):
        table.add_column(column, overflow="fold")
    for row in rows:
        p = row["p"]
        table.add_row(
            row["layer"], row["title"], f"{row['nmi']:.3f}", f"{row['nmi_by_chance']:.3f}",
            "< 0.0001" if p < 1e-4 else f"{p:.4f}", f"{row['specialised']} of {row['experts']}",
        )  # fmt: skip
    return table
