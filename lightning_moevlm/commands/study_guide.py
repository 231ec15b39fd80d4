"""Documentation of studies: `moevlm sweep new`, and what `moevlm list` and `moevlm describe` tell of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.commands.output import console, written
from lightning_moevlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

STUDY = "study"


def new(file: str) -> None:
    """Write a study file to start from: it plans as it is, and a comment explains each key.

    Args:
        file: Where to write it, e.g. mine.yaml. Its name without .yaml becomes the study's name.
    """
    from lightning_moevlm.study.guide import skeleton
    from lightning_moevlm.study.spec import refuse_bad_name

    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a study is a YAML file; write {path.with_suffix('.yaml')}")
    refuse_bad_name(path)
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(skeleton(file))
        except FileExistsError as error:
            raise UserError(f"{file} is there already; remove it, or name another file") from error
    console().print(f"Wrote {file}. Show what it would run: moevlm sweep plan {file}", highlight=False, markup=False)


def design_rows() -> list[dict[str, str]]:
    """Return a row of `moevlm list` per design of a study."""
    from lightning_moevlm.study.guide import designs

    return [
        {"kind": "designs", "name": page.kind, "class_path": "", "summary": page.arms.rstrip(".")} for page in designs()
    ]


def metric_rows() -> list[dict[str, str]]:
    """Return a row of `moevlm list` per metric that a study can name."""
    from lightning_moevlm import keys

    return [
        {
            "kind": "metrics",
            "name": metric.pattern,
            "class_path": "",
            "summary": f"{metric.title} ({metric.unit or 'no unit'}, {_better(metric.better)})",
        }
        for metric in keys.ALL
    ]


def names() -> list[str]:
    """Return every name that `describe` takes from here."""
    from lightning_moevlm.study.guide import designs

    return [STUDY, *(page.kind for page in designs())]


def page_of(name: str) -> "tuple[RenderableType, list[dict[str, object]]] | None":
    """Return the page and the records of the study file or of a design; None for any other name."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lightning_moevlm.study.guide import ABOUT, design_text, designs, key_rows, study_rows

    found = next((page for page in designs() if page.kind == name), None)
    if name != STUDY and found is None:
        return None
    rows = study_rows() if found is None else key_rows(found.options)
    table = Table("key", "takes", "default", "meaning")
    for row in rows:
        table.add_row(*(Text(cell) for cell in (row.key, row.type, row.default, row.meaning)))
    text = ABOUT if found is None else design_text(found)
    return Group(Text(text), Text(""), table), [dataclasses.asdict(row) for row in rows]


def _better(word: str) -> str:
    return "no better direction" if word == "neither" else f"{word} is better"
