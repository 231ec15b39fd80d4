import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import check_shard, read_manifest


def test_written_manifest_reads_back_equal(scenes_root: Path, tmp_path: Path) -> None:
    manifest = read_manifest(scenes_root)
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path).digest == manifest.digest


def test_digest_names_the_data(scenes_root: Path) -> None:
    manifest = read_manifest(scenes_root)
    first = manifest.splits["train"][0]
    other = {**manifest.splits, "train": (replace(first, sha256="0" * 64), *manifest.splits["train"][1:])}
    assert replace(manifest, splits=other).digest != manifest.digest
    assert len(manifest.digest) == 64


def test_a_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moevlm data build"):
        read_manifest(tmp_path)


def test_malformed_json_names_the_line(scenes_copy: Path) -> None:
    path = scenes_copy / "manifest.json"
    lines = path.read_text().splitlines()
    lines[2] = ' "name" "scenes",'
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 3"):
        read_manifest(scenes_copy)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.pop("licence"), "'licence' is missing"),
        (
            lambda m: m["splits"]["train"][1].update(num_samples="many"),
            r"splits.train\[1\].num_samples: expected int, got str",
        ),
        (lambda m: m["splits"].pop("val"), "splits.val"),
        (lambda m: m.update(format="other/9"), "other/9"),
        (lambda m: m["splits"]["train"][0].update(file="../../etc/passwd"), "inside the set"),
        (lambda m: m["splits"]["train"][0].update(file="pipe:touch x"), "inside the set"),
        (lambda m: m["tokenizer"].update(file="/tmp/t.json"), "inside the set"),
        (lambda m: m.update(license=m.pop("licence")), "'licence' is missing; did you mean 'license'?"),
        (lambda m: m.update(image_size=-3), "image_size: expected int >= 0, got -3"),
        (lambda m: m.update(image_size=True), "image_size: expected int, got bool"),
        (lambda m: m["build"].update(notes=None), "build.notes: expected bool | int | float | str, got null"),
        (lambda m: m.update(format="moevlm-shards/2"), "'layout' is missing"),
        (
            lambda m: m.update(format="moevlm-shards/2", layout={"stored_as": {"png": 3}}),
            "layout.stored_as.png: expected array, got int",
        ),
        (
            lambda m: m.update(format="moevlm-shards/2", layout={"stored_as": {}, "keys_repeat": False}),
            "'layout.caption_field' is missing",
        ),
    ],
)
def test_wrong_fields_are_named(scenes_copy: Path, change: object, field: str) -> None:
    path = scenes_copy / "manifest.json"
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=field.replace("?", r"\?").replace("|", r"\|")):
        read_manifest(scenes_copy)


def test_shards_are_verified(scenes_copy: Path) -> None:
    shard = read_manifest(scenes_copy).splits["train"][0]
    path = check_shard(scenes_copy, shard)
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"train-000000.tar is truncated: .* --force true"):
        check_shard(scenes_copy, shard)
    path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])  # one bit
    with pytest.raises(UserError, match="not the one of its manifest"):
        check_shard(scenes_copy, shard)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        check_shard(scenes_copy, shard)
