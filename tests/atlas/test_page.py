"""The page of an atlas: self-contained, safe, readable without its script, and quick when it is large."""

import base64
import hashlib
import html
import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lightning_moevlm.atlas.gallery.top_tokens import TopPatch, TopTokens, TopWord, one_of_each_image
from lightning_moevlm.atlas.make_atlas import Atlas, LayerAtlas
from lightning_moevlm.atlas.page.sentences import describe
from lightning_moevlm.atlas.page.write_atlas import HTML_FILE, JSON_FILE, TENSORS_FILE, write_atlas
from lightning_moevlm.atlas.routing.confidence import Confidence, LayerConfidence
from lightning_moevlm.atlas.routing.trace import TracedLayer
from lightning_moevlm.atlas.statistics.claims import Claim
from lightning_moevlm.atlas.statistics.specialisation import Specialisation
from tests.browser import needs_chromium, open_page

ABOUT = {"run": "a </script> run", "checkpoint": "last.ckpt", "step": 3}
LAYERS, EXPERTS, VALUES, IMAGES = 12, 64, 64, 1000


@pytest.fixture(scope="module")
def written(planted: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_atlas(planted, ABOUT, "moevlm experts run", folder)
    return folder


def test_records_and_tensors_agree(written: Path, planted: Atlas) -> None:
    records, tensors = json.loads((written / JSON_FILE).read_text("utf-8")), load_file(written / TENSORS_FILE)
    (layer,) = records["layers"]
    first = layer["sheets"][0]
    assert first["serves"][0]["label"] == "text/category" and first["serves"][0]["value"] == "fruit"
    found = next(each for each in first["labels"] if each["label"] == "text/category")
    values = next(each["values"] for each in layer["results"] if each["label"] == "text/category")
    value, tokens, share, lift, low, high = found["values"][0]
    assert values[value] == "fruit" and share == 1.0 and 1 < low < lift < high
    assert tensors[f"counts/{layer['layer']}/text/category"][0, value] == tokens
    assert records["probe"]["name"].startswith("train-200-seed0-") and records["finding"]
    assert sum(each["load"] for each in layer["sheets"]) == pytest.approx(1, abs=1e-3)
    assert all("apple" in each["word"] or each["word"] for each in first["words"])
    together = tensors[f"together/{layer['layer']}/{layer['layer']}"]
    assert np.count_nonzero(together - np.diag(np.diag(together))) == 0  # one expert a token


def test_a_label_without_a_test_is_not_said_to_be_absent(planted: Atlas) -> None:
    """Where each modality has experts of its own, no layer has two modalities."""
    (layer,) = planted.of_layers
    kept = [place for place, each in enumerate(layer.results) if each.label.name != "modality"]
    results, adjusted = (tuple(of[place] for place in kept) for of in (layer.results, layer.adjusted))
    apart = replace(planted, of_layers=(replace(layer, results=results, adjusted=adjusted),))
    assert len(kept) == len(layer.results) - 1
    *_, absent, untested = describe(apart)
    assert absent.startswith("No expert is shown to be specialised by: ") and "modality" not in absent
    assert untested == "Not tested, since no layer has tokens of two values: modality."
    assert not any(line.startswith("Not tested") for line in describe(planted))


def test_the_page_needs_nothing_and_runs_one_script(written: Path) -> None:
    page = (written / HTML_FILE).read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) and "://" not in page.split("<script")[0]
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(page)
    assert page.count("</script>") == 3 and "a &lt;/script&gt; run" in page
    assert "fruit" in page.split("<script")[0]  # what each expert serves can be read without the script


def test_crossover_by_hand(planted: Atlas) -> None:
    (layer,) = planted.of_layers
    modality = next(each for each in layer.results if each.label.name == "modality")
    # 3 of 4 patches and no word go to expert 0: min(0.75, 0) + min(0.25, 1)
    counted = replace(modality, counts_EV=np.array([[3.0, 0.0], [1.0, 2.0]]))
    assert replace(layer, results=(counted,)).crossover == pytest.approx(0.25)
    assert replace(layer, results=()).crossover is None


def test_a_gallery_shows_an_image_once(planted: Atlas) -> None:
    patches = [TopPatch(1 - n / 100, 0.0, "questions", f"q{n}", n, "", n // 2) for n in range(30)]
    assert [each.key for each in one_of_each_image(patches)] == [f"q{n}" for n in range(0, 24, 2)]
    shown = [{each.image for each in tops.patches} for layer in planted.of_layers for tops in layer.tops]
    assert {len(images) for images in shown} == {0, 12}, "of 200 images; expert 0 has words alone"


@needs_chromium
def test_the_sheet_of_an_expert_in_a_browser(written: Path, tmp_path: Path) -> None:
    shown = open_page(f"file://{written / HTML_FILE}#expert-0-0", tmp_path / "profile", 2000, "--window-size=1200,900")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    page = shown.stdout
    assert len(re.findall("<button[^>]*aria-pressed=", page)) == 4 and 'aria-pressed="true"' in page
    assert re.search(r'<h2 id="sheet-title">[^<]*, expert 0</h2>', page)
    sheet = page[page.index('id="sheet-body"') : page.index('aria-labelledby="numbers"')]
    assert "specialised" in sheet and "no claim beyond" in sheet and "<mark>" in sheet
    images = re.findall(r"<img[^>]*>", page)
    assert all('alt="' in image and 'alt=""' not in image for image in images)


def large_atlas(like: Atlas) -> Atlas:
    """12 layers of 64 experts with every label, 12 patches and 12 words each, and 1000 images."""
    random = np.random.default_rng(0)
    keys = [("scenes", f"scene-{number:08d}") for number in range(IMAGES)]
    image = "data:image/jpeg;base64," + "A" * 9000
    values = tuple(f"value number {value}" for value in range(VALUES))
    layers = []
    for block in range(LAYERS):
        counts_EV = random.poisson(40, (EXPERTS, VALUES)).astype(float)
        some_E = random.random(EXPERTS)
        results = tuple(
            Specialisation(
                label, values, counts_EV, counts_EV / 40, counts_EV / 50, counts_EV / 30, 0.2, 0.1, 0.001, some_E,
                some_E, some_E, dict.fromkeys(label.beyond, some_E),
            )
            for label in like.labels
        )  # fmt: skip
        tops = tuple(
            TopTokens(
                [
                    TopPatch(0.9, 0.0, *keys[random.integers(IMAGES)], n, "a red apple above a star", n)
                    for n in range(12)
                ],
                [TopWord(0.9, 0.0, "scenes", "scene-1", "left of a", "star", "on a blue ground") for _ in range(12)],
            )
            for _ in range(EXPERTS)
        )
        claim = Claim(like.labels[0].name, "text", 0.5, 0.1, 5.0, 4.0, 6.0, 0.4, 0.2, 1e-5)
        sure = Confidence(1000, 0.5, 0.5, (0.1,) * 10)
        ones = tuple(np.ones(EXPERTS))
        layers.append(
            LayerAtlas(
                TracedLayer(f"blocks.{block}.ffn", block, EXPERTS, False), results, (some_E,) * len(results),
                LayerConfidence({"image": sure, "text": sure}, ones, ones), tops, ((claim,),) * EXPERTS,
            )
        )  # fmt: skip
    pairs = [(i, j) for i in range(LAYERS) for j in range(i, LAYERS)]
    together = {pair: random.poisson(40, (EXPERTS, EXPERTS)).astype(float) for pair in pairs}
    return replace(like, of_layers=tuple(layers), together=together, images=dict.fromkeys(keys, image))


@pytest.mark.slow  # writes and opens a page of many megabytes; -s prints the figures
@needs_chromium
def test_a_large_page_is_small_and_quick(planted: Atlas, tmp_path: Path) -> None:
    page = write_atlas(large_atlas(planted), ABOUT, "moevlm experts run", tmp_path)
    assert page.stat().st_size < 30_000_000
    blank = tmp_path / "blank.html"
    blank.write_text("<!DOCTYPE html><title>nothing</title>", "utf-8")
    _, idle = open_busily(f"file://{blank}", tmp_path / "idle")
    shown, busy = open_busily(f"file://{page}#expert-3-5", tmp_path / "busy")
    assert len(re.findall("<button[^>]*aria-pressed=", shown)) == LAYERS * EXPERTS and "expert 5</h2>" in shown
    size = page.stat().st_size / 1e6
    print(f"\n{size:.1f} MB; {busy:.2f} s of CPU to open it and write its elements, {idle:.2f} s for an empty page")
    assert busy - idle < 2  # other programs do not count


def open_busily(address: str, profile: Path) -> tuple[str, float]:
    """Return the elements of a page, and the seconds of a processor that the browser has used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = open_page(address, profile, 100).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return shown, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
