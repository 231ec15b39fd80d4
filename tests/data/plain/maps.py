"""Functions for samples, as a user would name them in data.webdataset.map."""

from typing import Any


def shout(sample: dict[str, Any]) -> dict[str, Any] | None:
    """Captions in upper case; samples with odd keys are left out."""
    if int(sample["__key__"]) % 2:
        return None
    return sample | {"txt": sample["txt"].decode().upper()}


class Turned:
    """Images upside down."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"jpg": sample["jpg"].rotate(180 * self.times)}


def failing(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["__key__"].endswith("3"):
        raise KeyError("no such field")
    return sample
