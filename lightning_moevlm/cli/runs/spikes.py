"""`moevlm spikes`: what went wrong in a run, what moved first, and what may help."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning_moevlm.cli.output import console, json_number, show
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lightning_moevlm.study.forensics.explain import Explanation

_MOVES_SHOWN, _SAMPLES_SHOWN = 5, 128


def spikes(
    run: str,
    json: str | None = None,
    out: str | None = None,
    data: str | None = None,
    tracking_uri: str | None = None,
) -> None:
    """Explain the spikes, losses that are not finite and crashes of a run, from the recordings of its last steps.

    Args:
        run: Folder, name or id of a run, or the file of a recording.
        json: Write one record per event step to this file as JSON instead of the text; - is standard output.
        out: Folder for pages with the samples of each batch; by default the run's folder, in recordings/.
        data: Set that the samples are read from; by default that of the run's configuration.
        tracking_uri: MLflow store of the run; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.
    """
    from lightning_moevlm.study.forensics.explain import explain
    from lightning_moevlm.tracking.recordings.find_recordings import find_recordings
    from lightning_moevlm.tracking.recordings.recording import FOLDER, read_recording

    with TemporaryDirectory() as downloads:
        found = find_recordings(run, tracking_uri, Path(downloads))
        explained = [each for file in found.files for each in explain(read_recording(file))]
    roots = {"": data} if data is not None else {} if found.run_dir is None else _roots(found.run_dir)
    pages = Path(out) if out is not None else None if found.run_dir is None else found.run_dir / FOLDER
    records: list[dict[str, object]] = []
    for each in explained:
        page, reason = _page(each, roots, pages)
        records.append(_record(each, page, reason))
    if json is not None:
        show("", records, json)
        return
    for each, record in zip(explained, records, strict=True):
        console().print(_text(each, record))


def _roots(run_dir: Path) -> dict[str, str]:
    """Return the sets of a run's newest configuration, by source."""
    from lightning_moevlm.common.yaml_text import read_yaml

    files = sorted(run_dir.glob("config*/config.yaml"), key=lambda path: int(path.parent.suffix[1:] or 0))
    if not files:
        return {}
    data: Mapping[str, Any] = read_yaml(files[-1].read_text(encoding="utf-8")).get("data") or {}
    sources = {name: source["root"] for name, source in (data.get("sources") or {}).items() if source}
    return sources or ({"": str(data["root"])} if data.get("root") else {})


def _page(explanation: "Explanation", roots: Mapping[str, str], folder: Path | None) -> tuple[str | None, str]:
    """Write a page with the samples of the batch for each source; return the first, or why there is none."""
    if not any(explanation.keys.values()):
        return None, "the keys of the batch were not recorded"
    if folder is None or not roots:
        return None, "the run's folder is not here; give --data SET and --out FOLDER"
    from lightning_moevlm.data.inspect.html_page import write_page_of
    from lightning_moevlm.data.storage.shard_storage import ShardStorage

    written: list[Path] = []
    for source, keys in explanation.keys.items():
        root = roots.get(source, roots.get(""))
        if root is None or not keys:
            continue
        name = f"step{explanation.step:08d}{f'_{source}' if source else ''}.html"
        kinds = ", ".join(dict.fromkeys(event.kind for event in explanation.events))
        title = f"Step {explanation.step} ({kinds}): {len(keys)} samples{f' of {source}' if source else ''}"
        try:
            with explain_write_errors(folder / name):
                write_page_of(ShardStorage(root), keys[:_SAMPLES_SHOWN], title, folder / name)
        except UserError as error:  # of the data: the explanation needs none
            return None, str(error)
        written.append(folder / name)
    return (str(written[0]), "") if written else (None, "no set of the run has the batch's sources")


def _record(explanation: "Explanation", page: str | None, reason: str) -> dict[str, object]:
    import msgspec

    moved = [
        {**each._asdict(), "score": json_number(each.score), "value": json_number(each.value)}
        for each in explanation.moved
    ]
    return {
        "step": explanation.step,
        "events": msgspec.to_builtins(explanation.events),
        "first": explanation.first.quantity if explanation.first else None,
        "first_term": explanation.first_term,
        "first_layer": explanation.first_layer,
        "moved": moved,
        "before": msgspec.to_builtins(explanation.before),
        "illnesses": [
            {
                "name": each.illness.name,
                "step": each.step,
                "evidence": each.evidence,
                "switch_on": list(each.illness.switch_on),
                "source": each.illness.source,
                "cure_studies": [f"ablations/cures/{name}.yaml" for name in each.illness.overlays],
            }
            for each in explanation.diagnoses
        ],
        "keys": {source: list(keys) for source, keys in explanation.keys.items()},
        "page": page,
        "no_page": reason or None,
    }


def _text(explanation: "Explanation", record: Mapping[str, object]) -> "RenderableType":
    from rich.text import Text

    from lightning_moevlm.study.forensics.illnesses import describe_move

    step = explanation.step
    lines = [f"Step {step}: " + "; ".join(f"{each.kind} {each.detail}".strip() for each in explanation.events)]
    term, layer = explanation.first_term or "none", explanation.first_layer or "none"
    lines.append(f"  first term: {term}; first layer: {layer}")
    for each in explanation.moved[:_MOVES_SHOWN]:
        lines.append(f"  moved {step - each.step} steps before: {describe_move(each)}")
    if not explanation.moved:
        lines.append("  no recorded quantity moved beyond its past, or the past is too short")
    rest = len(explanation.moved) - _MOVES_SHOWN
    if rest > 0:
        lines.append(f"  and {rest} more; --json lists them")
    for event in explanation.before:
        lines.append(f"  before: {event.kind} at step {event.step}")
    for number, found in enumerate(explanation.diagnoses, 1):
        lines.append(f"  {number}. {found.illness.name}: {found.evidence}")
        lines.append(f"     switch on {' or '.join(found.illness.switch_on)} ({found.illness.source})")
        if found.illness.overlays:
            lines.append(
                "     cures tried: " + ", ".join(f"ablations/cures/{name}.yaml" for name in found.illness.overlays)
            )
    lines.append(f"  samples: {record['page'] or record['no_page']}")
    return Text("\n".join(lines))
