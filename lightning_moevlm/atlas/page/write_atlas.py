"""Writes an atlas: one page that opens anywhere, its records as JSON, all its numbers as safetensors."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_moevlm import __version__
from lightning_moevlm.atlas.make_atlas import Atlas
from lightning_moevlm.atlas.page.records import to_records, write_tensors
from lightning_moevlm.atlas.page.sentences import describe
from lightning_moevlm.atlas.section import Section, show_p
from lightning_moevlm.common.atomic_files import explain_write_errors, write_atomically
from lightning_moevlm.study.report.render import render_of
from lightning_moevlm.study.report.tables.table import NOTHING, Table

HTML_FILE, JSON_FILE, TENSORS_FILE = "experts.html", "experts.json", "experts.safetensors"
_TEMPLATES = Path(__file__).parent / "templates"


def write_atlas(
    atlas: Atlas, about: Mapping[str, Any], command: str, folder: Path, sections: Sequence[Section] = ()
) -> Path:
    """Write all files into a folder; return the page.

    Args:
        atlas: to write.
        about: the model: `run`, `checkpoint`, `step`.
        command: that makes the atlas again.
        folder: its place.
        sections: what else was made: needs, history, other runs.

    Raises:
        UserError: the folder cannot be written.
    """
    records = to_records(atlas, about)
    finding = describe(atlas)
    whole = {**records, "finding": finding, **{each.key: each.records for each in sections}}
    write_atomically(folder / JSON_FILE, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    with explain_write_errors(folder / TENSORS_FILE):
        write_tensors(atlas, folder / TENSORS_FILE)
    write_atomically(folder / HTML_FILE, render_page(atlas, records, finding, command, sections))
    return folder / HTML_FILE


def render_page(
    atlas: Atlas, records: Mapping[str, Any], finding: Sequence[str], command: str, sections: Sequence[Section] = ()
) -> str:
    """Return the page."""
    numbers = {place: number for number, place in enumerate(atlas.images)}
    sheets = [
        {
            **layer,
            "sheets": [
                {
                    **sheet,
                    "patches": [
                        {**each, "image": numbers.get((each["source"], each["key"]))} for each in sheet["patches"]
                    ],
                }
                for sheet in layer["sheets"]
            ],
        }
        for layer in records["layers"]
    ]
    script = (_TEMPLATES / "atlas.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    return render_of(
        _TEMPLATES,
        "atlas.html.j2",
        records=records,
        finding=finding,
        sections=sections,
        tables=[
            layers_table(records),
            confidence_table(records),
            *(label_table(layer) for layer in records["layers"]),
            claims_table(records),
        ],
        content=_embed({**records, "layers": sheets}),
        images=_embed([*atlas.images.values()]),
        script=script,
        script_digest=digest,
        command=command,
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def _embed(content: object) -> str:
    """Return JSON that may stand in a script element."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def layers_table(records: Mapping[str, Any]) -> Table:
    """Return load, crossover and confidence of each layer."""
    rows = []
    for layer in records["layers"]:
        sure = layer["confidence"]
        rows.append(
            (
                layer["layer"],
                str(layer["experts"]),
                f"{layer['use_entropy']:.3f}",
                NOTHING if layer["crossover"] is None else f"{layer['crossover']:.3f}",
                *(
                    f"{sure[name][what]:.3f}" if name in sure else NOTHING
                    for name in ("image", "text")
                    for what in ("top", "entropy")
                ),
            )
        )
    columns = (
        "layer", "experts", "entropy of use", "modality crossover", "largest probability, patches",
        "undecidedness, patches", "largest probability, words", "undecidedness, words",
    )  # fmt: skip
    notes = (
        "entropy of use: of the experts' loads over ln E; 1 is even.",
        "modality crossover: sum over experts of the smaller of p(expert | image) and p(expert | text); 0: no expert "
        "is shared; –: the layer serves one modality.",
        "undecidedness: mean entropy of a token's probabilities over ln E; 0 is certain.",
    )
    return Table("Layers", columns, tuple(rows), notes)


def confidence_table(records: Mapping[str, Any]) -> Table:
    """Return the share of tokens by the largest probability that the router gives."""
    rows = tuple(
        (f"{layer['layer']}, {name}", f"{found['tokens']:,}", *(f"{part:.1%}" for part in found["histogram"]))
        for layer in records["layers"]
        for name, found in layer["confidence"].items()
    )
    parts = tuple(f"{part / 10:.1f} to {(part + 1) / 10:.1f}" for part in range(10))
    return Table("Tokens by their largest probability", ("layer, modality", "tokens", *parts), rows)


def label_table(layer: Mapping[str, Any]) -> Table:
    """Return the tests of all labels in a layer."""
    rows = tuple(
        (
            result["label"],
            f"{result['nmi']:.3f}",
            f"{result['nmi_by_chance']:.3f}",
            show_p(result["p"]),
            str(sum(any(claim["label"] == result["label"] for claim in sheet["serves"]) for sheet in layer["sheets"])),
        )
        for result in layer["results"]
    )
    columns = ("label", "NMI", "by chance", "p", "experts that serve a value of it")
    notes = (
        "NMI: information of experts and label over the smaller of their entropies. By chance: the largest mean of its "
        "null models. p: the largest of them, of the whole layer.",
    )
    return Table(f"Labels in {layer['layer']}", columns, rows, notes)


def claims_table(records: Mapping[str, Any]) -> Table:
    """Return what each expert serves, for those who see no colours."""
    rows: list[tuple[str, ...]] = []
    for layer in records["layers"]:
        for expert, sheet in enumerate(layer["sheets"]):
            for claim in sheet["serves"][:1] or [None]:
                cells: tuple[str, ...] = ("nothing beyond chance and simple rules",) + (NOTHING,) * 5
                if claim is not None:
                    interval = f"[{claim['low']:.2f}, {claim['high']:.2f}]"
                    cells = (
                        f"{claim['label']}: {claim['value']}", f"{claim['share']:.1%}", f"{claim['base']:.1%}",
                        f"{claim['lift']:.2f} {interval}", f"{claim['nmi']:.3f}", show_p(claim["p"]),
                    )  # fmt: skip
                rows.append((f"{layer['layer']}, expert {expert}", f"{sheet['load']:.1%}", *cells))
    columns = ("expert", "load", "serves first", "share", "base", "lift [95 %]", "NMI", "p (Holm)")
    return Table("What each expert serves", columns, tuple(rows))
