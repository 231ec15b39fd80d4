"""A set of statements about two images, and an independent judge of their truth."""

import json
import re
import tarfile
from pathlib import Path

from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.write.convert.convert import Converted
from lightning_moevlm.data.write.convert.sources.sets.statements import SetStatements
from lightning_moevlm.data.write.demo.drawing_catalogue import DRAWINGS
from tests.data.sources import write_set

NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4}


def convert_statements(scenes: Path, out: Path, per_image: float = 1.0, seed: int = 0) -> Converted:
    return write_set(SetStatements(scenes, None, per_image, seed), out)


def read_members(root: Path, split: str) -> dict[str, dict[str, bytes]]:
    """The members of a split's samples, by key and extension."""
    found: dict[str, dict[str, bytes]] = {}
    for entry in read_manifest(root).splits[split]:  # type: ignore[index]
        with tarfile.open(root / entry.file) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def is_true(text: str, left: bytes, right: bytes) -> bool:
    """Judge a statement by the json members of its scenes, reading it as English."""
    scenes = [json.loads(each) for each in (left, right)]
    counts = [{each["name"]: each["count"] for each in scene["objects"]} for scene in scenes]
    singular = {drawing.plural: drawing.name for drawing in DRAWINGS}
    if "grounds" in text:
        return bool(scenes[0]["ground"] == scenes[1]["ground"])
    if more := re.fullmatch(r"the left image contains more (.*) than the right one", text):
        one, other = (count.get(singular[more[1]], 0) for count in counts)
        return bool(one > other)
    if total := re.fullmatch(r"the two images contain (\w+) (.*) in total", text):
        return sum(count.get(singular[total[2]], 0) for count in counts) == NUMBERS[total[1]]
    names = re.findall(r"contains? an? (.+?)(?: and the|$)", text)
    shown = [[name in count for count in counts] for name in names]
    if text.startswith("both"):
        return all(shown[0])
    if text.startswith("exactly one"):
        return sum(shown[0]) == 1
    assert text.startswith("one image")
    return (shown[0][0] and shown[1][1]) or (shown[0][1] and shown[1][0])
