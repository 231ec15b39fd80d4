"""The page of samples: what it shows, and that nothing in the data becomes markup."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.convert import Licence
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource, JsonlSource
from tests.data.sources import caption, csv_source, jsonl_source, make_image, write_images, write_set

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'


class Elements(HTMLParser):
    """Every element of a page with its attributes, and all text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_samples_are_shown(scenes_root: Path, tmp_path: Path) -> None:
    page = write_page(ShardStorage(str(scenes_root)), "val", 5, None, tmp_path / "pages/scenes.html")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["scenes.html"]
    assert len(page.samples) == 5 and page.num_in_split == read_manifest(scenes_root).num_samples("val")
    elements = Elements(tmp_path / "pages/scenes.html")
    images = [attributes["src"] for tag, attributes in elements.tags if tag == "img"]
    assert len(images) == 5
    for source, sample in zip(images, page.samples, strict=True):
        assert source is not None and source.startswith("data:image/jpeg;base64,")
        assert base64.b64decode(source.partition(",")[2])[:2] == b"\xff\xd8"
        (caption,) = sample.captions
        assert caption.text in elements.text and "".join(caption.tokens) == caption.text
        assert len(sample.questions) >= 6 and sample.questions[0]["question"] in elements.text
        json.loads(sample.annotation)
    assert "[\n" not in re.sub(r"\[\n *[\[{]", "", page.samples[0].annotation)  # boxes on one line


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.jpg" for i in range(60)])
    rows = [
        {"image": f"{i}.jpg", "caption": f"{EVIL} {i}", EVIL: EVIL, "questions": [{"question": EVIL, "answer": EVIL}]}
        for i in range(60)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = JsonlSource(tmp_path / "t.jsonl", None, None, Columns("image", "caption", None, None))
    licence = Licence(EVIL, EVIL, EVIL)
    write_set(source, tmp_path / "set", licence=licence)
    page = write_page(ShardStorage(str(tmp_path / "set")), "train", 3, "ONERROR", tmp_path / "page.html")
    assert len(page.samples) == 3
    elements = Elements(tmp_path / "page.html")
    assert "script" not in {tag for tag, _ in elements.tags}
    assert all(not name.startswith("on") for _, attributes in elements.tags for name in attributes)
    sources = [attributes["src"] or "" for tag, attributes in elements.tags if tag == "img"]
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;") for source in sources)
    assert elements.text.count(EVIL) >= 3 * 4 + 3  # caption, question, answer, json of each; the licence
    policy = next(a["content"] for tag, a in elements.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_filter_looks_at_keys_captions_and_annotations(tmp_path: Path) -> None:
    source = JsonlSource(jsonl_source(tmp_path, 60), None, None, Columns("image", "caption", None, None))
    write_set(source, tmp_path / "set")
    everything = write_page(ShardStorage(str(tmp_path / "set")), "train", 100, None, tmp_path / "page.html").samples
    key = everything[7].key
    assert [
        s.key for s in write_page(ShardStorage(str(tmp_path / "set")), "train", 9, key, tmp_path / "page.html").samples
    ] == [key]
    green = write_page(ShardStorage(str(tmp_path / "set")), "train", 100, "GREEN", tmp_path / "page.html").samples
    assert [s.key for s in green] == [s.key for s in everything if "green" in s.captions[0].text]
    with pytest.raises(UserError, match=r"no sample of the train split .* contains 'nowhere'"):
        write_page(ShardStorage(str(tmp_path / "set")), "train", 9, "nowhere", tmp_path / "page.html")


def test_texts_alone_and_images_alone(tmp_path: Path) -> None:
    table = csv_source(tmp_path, 60)
    for columns, name in ((Columns(None, "caption", None, None), "t"), (Columns("image", None, None, None), "p")):
        source = CsvSource(table, tmp_path / "images", name, columns)
        write_set(source, tmp_path / name, image_format="png")
        page = write_page(ShardStorage(str(tmp_path / name)), "val", 4, None, tmp_path / "page.html")
        assert page.modality == {"t": "texts", "p": "images"}[name]
        images = [tag for tag, _ in Elements(tmp_path / "page.html").tags if tag == "img"]
        assert len(images) == (0 if name == "t" else len(page.samples))


def test_large_images_are_shown_small(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(make_image(i, size=(1000, 600)))
    rows = [{"image": f"{i}.jpg", "caption": caption(i), "split": s} for i, s in enumerate(("train", "val", "test"))]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = JsonlSource(tmp_path / "t.jsonl", None, None, Columns("image", "caption", None, "split"))
    write_set(source, tmp_path / "set")
    page = write_page(ShardStorage(str(tmp_path / "set")), "val", 9, None, tmp_path / "page.html")
    (sample,) = page.samples
    (image,) = sample.images
    assert image.size.startswith("1000 x 600 px")
    assert (tmp_path / "page.html").stat().st_size < len(make_image(1, size=(1000, 600))) / 2


def test_the_page_shows_faults(scenes_copy: Path, tmp_path: Path) -> None:
    shard = scenes_copy / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-600])
    page = write_page(ShardStorage(str(scenes_copy)), "val", 40, None, tmp_path / "page.html")
    (lost,) = page.lost
    assert "val-000000.tar is truncated" in lost and lost in Elements(tmp_path / "page.html").text
