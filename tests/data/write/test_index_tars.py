"""An index of tars that stay where they are: exact reading, one look at each tar, going on after a kill."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import SPLITS, read_manifest
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.find_tars import find_tars
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.tokenizer import TOKENIZER_FILE
from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions
from lightning_moevlm.data.write.index_tars import IndexOptions, index_tars
from tests.data.found_tars import LICENCE, flat, folder_of, keep, sample, three_tars, write_tar
from tests.data.unsteady_server import Unsteady, serve
from tests.waiting import wait_for

OPTIONS = IndexOptions("found", LICENCE, 400)


def index(urls: str | list[str], out: Path, options: IndexOptions = OPTIONS, max_bad: int = 0) -> Converted:
    return index_tars(find_tars(urls), out, options, ConvertOptions(max_bad, 1, False))


def batches(root: Path, cache: Path) -> list[tuple[str, ...]]:
    data = ShardDataModule(str(root), 4, 16, 16, 400, num_streams=2, cache_dir=str(cache))
    data.prepare_data()
    return [batch.keys for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]


def test_tars_stay_and_are_read_exactly(tars: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tars.iterdir()}
    converted = index(f"{tars}/part-{{0..2}}.tar", tmp_path / "set")
    assert converted.built and converted.num_rows == 24
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "LICENCE.txt", "manifest.json", "tokenizer.json",
    ]  # fmt: skip
    assert {path: path.read_bytes() for path in tars.iterdir()} == before
    assert read_manifest(tmp_path / "set") == converted.manifest and converted.manifest.shards_at == str(tars)
    keep(tars, tmp_path / "linked")
    assert batches(tmp_path / "set", tmp_path) == batches(tmp_path / "linked", tmp_path)
    assert not check_set(ShardStorage(str(tmp_path / "set"))).problems
    assert not index(f"{tars}/part-{{0..2}}.tar", tmp_path / "set").built  # nothing to do
    (tars / "part-1.tar").write_bytes(before[tars / "part-0.tar"])
    with pytest.raises(UserError, match=rf"shard {tars}/part-1.tar is"):
        batches(tmp_path / "set", tmp_path)


def test_tars_of_a_benchmark_are_one_split(tars: Path, tmp_path: Path) -> None:
    (tars / "part-2.tar").unlink()
    with pytest.raises(UserError, match=r"2 tars, but .* or index them as one split: --split train"):
        index(str(tars), tmp_path / "set")
    with pytest.raises(UserError, match="--split test needs --tokenizer FILE"):
        index(str(tars), tmp_path / "set", OPTIONS._replace(split="test"))
    own = OPTIONS._replace(split="train")
    for name, options in {
        "train": own,
        "test": own._replace(split="test", tokenizer=tmp_path / "train" / TOKENIZER_FILE),
    }.items():
        manifest = index(str(tars), tmp_path / name, options).manifest
        assert {split: manifest.num_samples(split) for split in SPLITS} == dict.fromkeys(SPLITS, 0) | {name: 16}
        assert not check_set(ShardStorage(str(tmp_path / name))).problems
    data = ShardDataModule(str(tmp_path / "test"), 4, 16, 16, 400, num_streams=2)
    assert sum(len(batch.keys) for batch in data.test_dataloader()) == 16
    with pytest.raises(UserError, match="the evaluation split of found is empty"):
        data.val_dataloader()


def test_the_place_of_tars_is_no_part_of_the_digest(tars: Path, tmp_path: Path) -> None:
    one = index(str(tars), tmp_path / "set").manifest
    manifest = json.loads((tmp_path / "set/manifest.json").read_text("utf-8"))
    assert manifest["format"] == "moevlm-shards/3"
    moved = shutil.move(tars, tmp_path / "moved")
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest | {"shards_at": str(moved)}), "utf-8")
    assert read_manifest(tmp_path / "set").digest == one.digest and batches(tmp_path / "set", tmp_path)


def test_tars_of_a_server_are_read_once_and_go_on_after_an_error(server: Unsteady, tars: Path, tmp_path: Path) -> None:
    aside = (tars / "part-2.tar").rename(tars / "aside")
    server.drops, server.busy = 1, 1
    urls = f"{server.url}/sets/part-{{0..2}}.tar"
    with pytest.raises(UserError, match=rf"{server.url}/sets/part-2.tar is missing"):
        index(urls, tmp_path / "set")
    asked = [path for path, _ in server.asked]
    assert asked.count("/sets/part-0.tar") == 3 and asked.count("/sets/part-1.tar") == 1  # busy, then cut, then whole
    aside.rename(tars / "part-2.tar")
    manifest = index(urls, tmp_path / "set").manifest
    assert [path for path, _ in server.asked].count("/sets/part-0.tar") == 3  # known from before
    assert manifest.shards_at == f"{server.url}/sets"
    keep(tars, tmp_path / "linked")
    assert batches(tmp_path / "set", tmp_path / "cache") == batches(tmp_path / "linked", tmp_path)
    assert not list((tmp_path / "set").glob("*.tar")) and not list(tmp_path.glob(".set.*"))


def test_a_folder_of_a_web_server_is_listed(tars: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(tars.parent))  # it lists folders as pages of links
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/web"
        for urls in (url, f"{url}/", f"{url}/part-*.tar"):
            assert [tar.place for tar in find_tars(urls)] == [f"{url}/part-{number}.tar" for number in range(3)]
        with pytest.raises(UserError, match=rf"{url}/none.* is missing"):
            find_tars(f"{url}/none")
        server.shutdown()


def test_an_index_that_is_killed_goes_on(server: Unsteady, tmp_path: Path) -> None:
    server.delay_s = 0.3
    urls = f"{server.url}/sets/part-{{0..2}}.tar"
    process = multiprocessing.get_context("fork").Process(target=index, args=(urls, tmp_path / "set"))
    process.start()
    assert process.pid is not None
    wait_for(lambda: bool(list(tmp_path.glob(".set.converting-*/journal/tar-part-1.tar*.json"))))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "set").exists()
    index(urls, tmp_path / "set")
    asked = [path for path, _ in server.asked]
    assert asked.count("/sets/part-0.tar") == asked.count("/sets/part-1.tar") == 1
    assert not list(tmp_path.glob(".set.*"))


def test_bad_samples_are_counted_or_stop_it(tars: Path, tmp_path: Path) -> None:
    files = flat(sample(30, "good"), sample(31, "textless")[:1], [("noimage.txt", b"a red thing")])
    files += [
        ("text.jpg", b"not an image"),
        ("text.txt", b"a blue thing"),
        ("blank.txt", b" "),
        *sample(33, "blank")[:1],
    ]
    write_tar(tars / "part-3.tar", files)
    with pytest.raises(UserError, match=r"4 rows are bad, 0 allowed; the first: part-3.tar "):
        index(str(tars), tmp_path / "set")
    converted = index(str(tars), tmp_path / "set", max_bad=4)
    assert {count.cause: count.num_rows for count in converted.left_out} == {
        "member_missing": 2, "image_undecodable": 1, "caption_empty": 1,
    }  # fmt: skip
    (tars / "part-3.tar").write_bytes((tars / "part-0.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"part-3.tar is truncated or not a tar"):
        index(str(tars), tmp_path / "other")


def test_a_tokenizer_of_ones_own_is_copied(tars: Path, tmp_path: Path) -> None:
    index(str(tars), tmp_path / "set")
    own = tmp_path / "set" / TOKENIZER_FILE
    with_own = index(str(tars), tmp_path / "other", OPTIONS._replace(tokenizer=own, vocab_size=300)).manifest
    assert with_own.tokenizer == read_manifest(tmp_path / "set").tokenizer
    assert (tmp_path / "other" / TOKENIZER_FILE).read_bytes() == own.read_bytes()


def test_names_that_cannot_be_indexed_are_refused(tars: Path, server: Unsteady, tmp_path: Path) -> None:
    folder_of(tmp_path / "second", *three_tars(2))
    (tmp_path / "empty").mkdir()
    for urls, told in (
        (f"{tmp_path}/empty", "matches no tar: name tars as"),
        (f"{tars}/none-*.tar", "matches no tar"),
        (f"{tmp_path}/nowhere", "there is no folder .*nowhere"),
        (f"{tars}/part-{{0..5}}.tar", r"part-3.tar is missing; restore it"),
        (f"{tars}/part-{{0..2.tar", "is not a valid pattern"),
        (
            f"{tars}/part-{{0..1}}.tar",
            r"holds 2 tars, but training, validation and test need one each; .* --data.urls URLS",
        ),
        ([str(tars), str(tmp_path / "second")], "lie in 2 places .* mix them with data.sources"),
        (f"{server.url}/sets/part-{{0..2}}.tar?X-Amz-Signature=abc", "given with a signature or a password"),
        ("pipe:cat x.tar", "shell commands are not allowed"),
        ("ftp://host/x.tar", "'ftp', but only file, http, https, s3, gs are allowed"),
        ([], "names no tar"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            index(urls, tmp_path / "set")  # type: ignore[arg-type]
        assert "abc" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_a_server_cannot_name_local_folders(tars: Path, tmp_path: Path) -> None:
    index(str(tars), tmp_path / "set")
    for place in (str(tars), f"file://{tars}"):
        manifest = json.loads((tmp_path / "set/manifest.json").read_text("utf-8"))
        (tmp_path / "set/manifest.json").write_text(json.dumps(manifest | {"shards_at": place}), "utf-8")
        with (
            serve(Unsteady(tmp_path / "set")) as server,
            pytest.raises(UserError, match="a local folder, for its shards"),
        ):
            ShardStorage(f"{server.url}/set").read_manifest()
