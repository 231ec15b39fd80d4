"""A set in a real S3 API: moto's server on loopback, read by s3fs."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.faults import Lost
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.storage.find_tars import find_tars
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.convert import ConvertOptions
from lightning_moevlm.data.write.finish_set import Licence
from lightning_moevlm.data.write.index_tars import IndexOptions, index_tars

s3fs = pytest.importorskip("s3fs", reason="needs the extra s3")
boto3 = pytest.importorskip("boto3", reason="needs moto[server], of the extra dev")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server], of the extra dev")

WANTED = frozenset({"jpg", "txt"})
SECRET = "s3cr3t-access-key"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, scenes_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the small set; credentials and endpoint stand in the environment, as for a real store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # it would go on with the environment of its first use
    client = boto3.client("s3")
    client.create_bucket(Bucket="sets")
    for path in scenes_root.iterdir():
        client.upload_file(str(path), "sets", f"demo/scenes/{path.name}")
    yield "s3://sets/demo/scenes"
    for item in client.list_objects_v2(Bucket="sets").get("Contents", ()):
        client.delete_object(Bucket="sets", Key=item["Key"])
    client.delete_bucket(Bucket="sets")


def test_a_set_in_a_bucket_is_read_as_from_a_folder(bucket: str, scenes_root: Path, tmp_path: Path) -> None:
    options = {"batch_size": 8, "image_size": 32, "max_text_len": 16, "vocab_size": 400}
    local = ShardDataModule(str(scenes_root), **options)  # type: ignore[arg-type]
    for num_workers in (0, 2):
        remote = ShardDataModule(
            bucket,
            **options,
            num_workers=num_workers,
            cache_dir=str(tmp_path / str(num_workers)),  # type: ignore[arg-type]
        )
        remote.prepare_data()
        assert remote.manifest_digest == local.manifest_digest
        seen = {key for batch in remote.train_dataloader() for key in batch.keys}
        assert len(seen) == 120


def test_large_shards_come_in_pieces(
    bucket: str, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_moevlm.data.storage.remote_folder._PIECE_BYTES", 10_000)
    storage = ShardStorage(bucket, str(tmp_path))
    entry = storage.read_manifest().splits["train"][0]
    assert storage.local_path(entry).read_bytes() == (scenes_root / entry.file).read_bytes()


def test_tars_in_a_bucket_are_found_and_indexed(bucket: str, scenes_root: Path, tmp_path: Path) -> None:
    named = [path.name for path in sorted(scenes_root.glob("train-*.tar"))]
    for urls in (f"{bucket}/train-*.tar", f"{bucket}/train-{{000000..{len(named) - 1:06d}}}.tar"):
        assert [tar.file for tar in find_tars(urls)] == named
    assert len(find_tars(bucket)) == len(list(scenes_root.glob("*.tar")))
    converted = index_tars(
        find_tars(f"{bucket}/train-*.tar"), tmp_path / "set", IndexOptions(None, Licence("CC0", "", ""), 400),
        ConvertOptions(0, 1, False),
    )  # fmt: skip
    assert converted.num_rows == 120 and converted.manifest.shards_at == bucket
    remote = ShardDataModule(str(tmp_path / "set"), 8, 32, 16, 400, cache_dir=str(tmp_path / "cache"))
    remote.prepare_data()
    assert sum(batch.num_samples for batch in remote.val_dataloader()) > 0
    plain = ShardDataModule(None, 8, 32, 16, 400, cache_dir=str(tmp_path / "plain"), urls=f"{bucket}/train-*.tar")
    plain.prepare_data()
    assert next(iter(plain.train_dataloader())).pairs == 8
    with pytest.raises(UserError, match=rf"{bucket}/none.tar is missing"):
        find_tars(f"{bucket}/none.tar")[0].storage.stream("none.tar")


def test_faults_in_a_bucket(bucket: str, scenes_root: Path, tmp_path: Path) -> None:
    storage = ShardStorage(bucket, str(tmp_path), attempts=2, backoff_s=0.001)
    entries = storage.read_manifest().splits["train"]
    client = boto3.client("s3")
    client.delete_object(Bucket="sets", Key=f"demo/scenes/{entries[0].file}")
    data = (scenes_root / entries[1].file).read_bytes()
    client.put_object(Bucket="sets", Key=f"demo/scenes/{entries[1].file}", Body=data[:-1024])
    client.put_object(Bucket="sets", Key=f"demo/scenes/{entries[2].file}", Body=data[:-1] + b"x")
    found = [list(read_shard(storage, entry, WANTED)) for entry in entries[:4]]
    for entry, lost, cause in zip(entries, found, ("shard_missing", "shard_truncated", "shard_altered"), strict=False):
        (item,) = lost
        assert isinstance(item, Lost) and item[:2] == (entry.num_samples, cause)
        assert f"{bucket}/{entry.file}" in item.message
    assert len(found[3]) == entries[3].num_samples and all(isinstance(item, RawSample) for item in found[3])


def test_a_missing_set_and_a_store_out_of_reach(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"s3://sets/other/manifest.json is missing"):
        ShardStorage("s3://sets/other", str(tmp_path)).read_manifest()
    with pytest.raises(UserError, match=r"s3://nowhere/manifest.json is missing"):
        ShardStorage("s3://nowhere", str(tmp_path)).read_manifest()


class _Cutter:
    """A proxy on loopback that cuts `cuts` connections after they have carried `after` bytes to the reader."""

    def __init__(self, endpoint: str, cuts: int, after: int) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self.cuts = cuts
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                reader, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(self._server)
            threading.Thread(target=self._carry, args=(reader, upstream, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(upstream, reader, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, to_reader: bool) -> None:
        carried = 0
        try:
            while data := source.recv(4096):
                carried += len(data)
                if to_reader and carried > self._after and self.cuts > 0:
                    self.cuts -= 1
                    break
                sink.sendall(data)
        except OSError:
            pass  # the other direction has closed both ends
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("cuts", [3, 1000])
def test_a_store_behind_a_bad_line(
    bucket: str, scenes_root: Path, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, cuts: int
) -> None:
    storage = ShardStorage(bucket, str(tmp_path), attempts=5, backoff_s=0.001)
    entry = storage.read_manifest().splits["train"][0]
    cutter = _Cutter(endpoint, cuts, after=30_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", cutter.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    found = list(read_shard(storage, entry, WANTED))
    cutter.close()
    s3fs.S3FileSystem.clear_instance_cache()
    if cuts == 3:
        assert cutter.cuts == 0
        assert found == list(read_shard(ShardStorage(str(scenes_root)), entry, WANTED))
    else:
        assert cutter.cuts < 1000
        (lost,) = found
        assert isinstance(lost, Lost) and lost[:2] == (entry.num_samples, "shard_unreachable")
        assert SECRET not in lost.message


@pytest.mark.slow
def test_the_example_trains_from_a_bucket(bucket: str, moevlm: Callable[..., str], tmp_path: Path) -> None:
    moevlm(
        "fit", "-c", "conf/quickstart.yaml", "-c", "conf/data/s3.yaml", "--trainer.fast_dev_run=true",
        f"--data.root={bucket}", f"--data.cache_dir={tmp_path / 'cache'}", "--data.batch_size=4",
        "--data.image_size=32",
    )  # fmt: skip
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]) >= 2  # train and val
    refused = moevlm(
        "fit", "-c", "conf/quickstart.yaml", "-c", "conf/data/s3.yaml", "--data.root=data/shards/scenes", code=2
    )
    assert "only s3 are allowed" in refused
