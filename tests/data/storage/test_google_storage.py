"""Sets in Google Cloud Storage: gcsfs is reached with what a server that speaks the JSON API expects."""

import sys
import types
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Lost
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from tests.data.gcs_server import Bucket, serve_bucket

WANTED = frozenset({"jpg", "txt"})
ROOT = "gs://sets/demo/scenes"


def _storage(cache: Path, root: str = ROOT, **options: Any) -> ShardStorage:
    return ShardStorage(root, str(cache), **{"backoff_s": 0.001, "attempts": 4, **options})


def test_a_missing_driver_is_one_line_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError) as refusal:
        _storage(tmp_path).read_manifest()
    assert "pip install 'lightning-moevlm[gs]'" in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_driver_is_given_the_path_alone_and_the_cache_is_named_by_the_address(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    asked: list[str] = []

    class Driver(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(options)

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            asked.append(path)
            return (scenes_root / Path(path).name).read_bytes()[start:end]

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            return {"name": path, "size": (scenes_root / Path(path).name).stat().st_size, "type": "file"}

    module = types.ModuleType("gcsfs")
    module.GCSFileSystem = Driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gcsfs", module)
    monkeypatch.setitem(_registry, "gs", Driver)
    entry = read_manifest(scenes_root).splits["train"][0]
    first = _storage(tmp_path).local_path(entry)
    other = _storage(tmp_path, "gs://other/demo/scenes/").local_path(entry)
    assert first != other and first.read_bytes() == other.read_bytes() == (scenes_root / entry.file).read_bytes()
    assert _storage(tmp_path, ROOT + "/").local_path(entry) == first, "a slash at the end changes nothing"
    assert asked == [f"sets/demo/scenes/{entry.file}", f"other/demo/scenes/{entry.file}"]
    assert all(options == {} for options in made), "credentials are the environment's business"


@pytest.fixture
def bucket(scenes_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # the JSON API alone: buckets of other kinds are asked for by gRPC, which a server of a test does not speak
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="needs the extra gs")
    with serve_bucket(Bucket(scenes_root)) as served:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        fsspec.config.set_conf_env(fsspec.config.conf)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield served
        gcsfs.GCSFileSystem.clear_instance_cache()
        fsspec.config.conf.pop("gs", None)


@pytest.mark.parametrize("drops", [0, 2])
def test_a_set_in_a_bucket_is_read_as_from_a_folder(
    bucket: Bucket, scenes_root: Path, tmp_path: Path, drops: int
) -> None:
    storage, local = _storage(tmp_path), ShardStorage(str(scenes_root))
    manifest = storage.read_manifest()
    assert manifest == read_manifest(scenes_root)
    assert storage.read_tokenizer(manifest.tokenizer).vocab_size == manifest.tokenizer.vocab_size
    bucket.drops = drops
    for entry in manifest.splits["train"][:2]:
        found = list(read_shard(storage, entry, WANTED))
        assert found == list(read_shard(local, entry, WANTED)) and all(isinstance(one, RawSample) for one in found)
    assert bucket.drops == 0
    assert any(asked_range.startswith("bytes=") for _, asked_range in bucket.asked)


def test_a_missing_object_is_lost_and_named(bucket: Bucket, scenes_copy: Path, tmp_path: Path) -> None:
    entry = read_manifest(scenes_copy).splits["train"][0]
    bucket.folder = scenes_copy
    (scenes_copy / entry.file).unlink()
    (lost,) = read_shard(_storage(tmp_path), entry, WANTED)
    assert isinstance(lost, Lost) and lost[:2] == (entry.num_samples, "shard_missing")
    with pytest.raises(UserError, match=r"gs://sets/nowhere/manifest.json is missing"):
        _storage(tmp_path, "gs://sets/nowhere").read_manifest()
