"""The report's page in a real browser: what it draws, whether its links lead somewhere, whether it can be read.

A second page on the same loopback server holds the report in frames of two widths and looks into them. Chromium is told
the colour scheme, and says on standard error what the pages write to the console.
"""

import base64
import dataclasses
import functools
import json
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm import __version__
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report import render as render_module
from lightning_moevlm.study.report.make_report import Report, describe_origin, make_report
from lightning_moevlm.study.report.write_report import write_report
from lightning_moevlm.tracking.read.series import Series
from tests.browser import needs_chromium, open_page
from tests.study.report.figures.test_figures import ended_at, loads, to_result
from tests.study.tiny_study import plan_of

UNTRUSTED = "<script>console.error('taken')</script>"
WIDTHS = (1280, 400)
PROBE = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><body><script>
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parts = text => text.match(/[\\d.]+/g).map(Number);
function ground(view, element) {  // of the nearest ancestor that has one
  for (let e = element; e; e = e.parentElement) {
    const colour = parts(view.getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, texts = page.createTreeWalker(page.body, 4);
  let worst = [99, ""];
  page.querySelectorAll("details").forEach(d => { d.open = true; });
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("[hidden]")) continue;
    const [a, b] = [light(parts(view.getComputedStyle(element).color)), light(ground(view, element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < worst[0]) worst = [contrast, element.outerHTML.slice(0, 200)];
  }
  const links = [...page.querySelectorAll("a")].map(a => a.getAttribute("href"));
  const ids = [...page.querySelectorAll("[id]")].map(e => e.id);
  return {
    width: view.innerWidth,
    overflow: page.documentElement.scrollWidth - view.innerWidth,
    images: [...page.images].map(i => [i.naturalWidth, i.complete, i.alt.length]),
    links: links.length, dead: links.filter(l => !l.startsWith("#") || !page.getElementById(l.slice(1))),
    twins: ids.filter((id, i) => ids.indexOf(id) !== i),
    ground: ground(view, page.body), worst,
    headings: [...page.querySelectorAll("h1,h2,h3,h4")].map(h => Number(h.tagName[1])),
    landmarks: ["body > header", "main > nav", "body > main", "body > footer"].map(
      each => page.querySelectorAll(each).length),
    bare: page.querySelectorAll(
      "table:not(:has(caption)), th:not([scope]), img:not([alt]), .scroll:not([tabindex])").length,
    unlike: [...page.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth + 1
      && view.getComputedStyle(s).overflowX !== "auto").length,
    scripts: page.scripts.length, focused: focus(page, view),
  };
}
function focus(page, view) {
  page.querySelector("nav a").focus({focusVisible: true});
  return parseFloat(view.getComputedStyle(page.activeElement).outlineWidth);
}
const frames = %s.map(width => {
  const frame = document.createElement("iframe");
  Object.assign(frame, {src: "report.html", width, height: 900});
  document.body.append(frame);
  return frame;
});
addEventListener("load", async () => {
  for (const frame of frames) await Promise.all([...frame.contentDocument.images].map(i => i.decode()));
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(frames.map(look)))));
  document.body.append(told);
});
</script>"""

pytestmark = needs_chromium


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and keeps its log to itself."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def renamed(report: Report) -> Report:
    """Give an arm a name that no study file may have, as a run in a foreign store could."""
    arms = tuple(
        dataclasses.replace(arm, arm=dataclasses.replace(arm.arm, name=UNTRUSTED)) for arm in report.result.arms
    )
    stories = tuple(dataclasses.replace(story, name=UNTRUSTED, description=UNTRUSTED) for story in report.origin.arms)
    tables = tuple(
        dataclasses.replace(table, rows=tuple((UNTRUSTED, *row[1:]) for row in table.rows), notes=(UNTRUSTED,))
        for table in report.tables
    )
    figures = tuple(dataclasses.replace(figure, alt=f'"{UNTRUSTED}') for figure in report.figures)
    result = dataclasses.replace(report.result, arms=(report.result.arms[0], *arms[1:]))
    origin = dataclasses.replace(report.origin, arms=stories)
    return dataclasses.replace(report, result=result, origin=origin, tables=tables, figures=figures)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A factorial study with costs, loads, spikes and a divergence, so that nearly every figure is there."""
    folder = tmp_path_factory.mktemp("page")

    def series(run: Any) -> dict[str, Series] | None:
        fast = run.resolved["model"]["speed"] == 0.9
        if fast and run.seed == 2:
            return None
        loss = [5.0 + 0.01 * (step % 2) + 4.0 * (step == 20 and fast) for step in range(30)]
        also = {"memory__peak_process": 100.0 + fast, "val__accuracy_text": 0.5, "val__majority_text": 0.2}
        own = ended_at(5.0 + run.seed - fast, throughput__samples_per_second=99.0 + fast, **also)
        layers = loads({"image": (0.75, 0.25), "text": (0.1, 0.9)}) | loads({"text": (0.5, 0.5)}, block=3)
        return own | layers | {"train/task_loss": Series(tuple(range(30)), tuple(loss))}

    factors = {name: {"on": {f"model.{name}": 0.9}} for name in ("skew", "speed")}
    long_keys = [f"load/block{block}/text/expert{expert}" for block in (1, 3) for expert in (0, 1)]
    study = {"arms": None, "factors": factors, "design": "factorial", "also": long_keys, "seeds": [0, 1, 2, 3]}
    result: StudyResult = to_result(folder, study, series)
    return make_report(describe_origin(plan_of(folder / "tiny.yaml"), result), result)


@pytest.fixture(scope="module")
def address(request: Any, report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server on loopback has the report and the page that looks into it."""
    folder = tmp_path_factory.mktemp("served") / "report"
    write_report(renamed(report) if request.param == "untrusted" else report, folder)
    (folder / "probe.html").write_text(PROBE % json.dumps(WIDTHS))
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/probe.html"
        server.shutdown()
        thread.join()


def looked_at(address: str, scheme: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Return what the probe has seen in each frame, and what the browser wrote to standard error."""
    options = ("--window-size=1400,1000", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    done = open_page(address, folder, 30_000, *options)
    told = re.search(r'<pre id="told">([^<]+)</pre>', done.stdout)
    assert told, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(base64.b64decode(told[1])), done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("address", "scheme"),
    [
        ("as it is", "light"),
        ("as it is", "dark"),
        ("untrusted", "light"),
        pytest.param("untrusted", "dark", marks=pytest.mark.slow),  # a scheme changes colours alone
    ],
    indirect=["address"],
)
def test_page_in_a_browser(address: str, scheme: str, tmp_path: Path, report: Report) -> None:
    frames, errors = looked_at(address, scheme, tmp_path / "profile")
    assert "CONSOLE" not in errors, [line for line in errors.splitlines() if "CONSOLE" in line]
    assert [frame["width"] for frame in frames] == list(WIDTHS)
    for frame in frames:
        assert len(frame["images"]) == len(report.figures) == 9
        assert all(width > 0 and complete and alt for width, complete, alt in frame["images"])
        assert frame["links"] > 20
        assert (frame["dead"], frame["twins"]) == ([], [])
        assert frame["overflow"] <= 0
        assert (sum(frame["ground"][:3]) < 150) is (scheme == "dark")
        assert frame["worst"][0] >= 4.5, frame["worst"]
        assert frame["headings"][0] == 1
        assert all(b - a <= 1 for a, b in zip(frame["headings"], frame["headings"][1:], strict=False))
        assert frame["headings"].count(1) == 1
        assert frame["landmarks"] == [1, 1, 1, 1]
        assert (frame["bare"], frame["unlike"], frame["scripts"]) == (0, 0, 0)
        assert frame["focused"] >= 2


def test_a_page_of_a_mere_checkout_names_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.13.0"}
    monkeypatch.setattr(render_module, "version", found.__getitem__)
    assert render_module.list_versions("torch") == f"lightning-moevlm {__version__}, torch 2.13.0"
