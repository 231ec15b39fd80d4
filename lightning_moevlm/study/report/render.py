"""Renders the templates of pages, as HTML or Markdown."""

import base64
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm import __version__
from lightning_moevlm.study.report.tables.table import find_verdict

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


def list_versions(*packages: str) -> str:
    """Return "lightning-moevlm 0.1.0, ..." with the installed packages; the project itself may be a mere checkout."""
    return ", ".join([f"lightning-moevlm {__version__}", *(f"{name} {version(name)}" for name in packages)])


def render(template: str, **values: object) -> str:
    """Return a template with its values; those of HTML are escaped."""
    return render_of(_TEMPLATES, template, **values)


def render_of(folder: Path, template: str, **values: object) -> str:
    """Return a template of another folder with its values; it may include and import those here."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _TEMPLATES]),
        autoescape=".html" in template,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    environment.filters["verdict_class"] = lambda cell: find_verdict(cell).replace(" ", "-")
    environment.filters["breakable"] = _breakable
    environment.filters["markdown_cell"] = lambda text: text.replace("|", "\\|")
    return environment.get_template(template).render(**values)


def _breakable(name: str) -> "Markup":
    """Return a name as HTML that may be broken after _ and /; copying it gives the plain name."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[_/])(?=[^_/])", "<wbr>", str(escape(name))))
