"""Turns of conversations are read from the json member of a sample."""

import json

import pytest

from lightning_moevlm.data.text.chat import read_turns


def test_turns_are_read() -> None:
    content = {"answers": ["a cat"], "turns": [["what is it?", " a cat "], ["sure?", "yes"]]}
    assert read_turns(json.dumps(content).encode()) == (("what is it?", "a cat"), ("sure?", "yes"))
    assert read_turns(b'{"answers": ["yes"]}') == read_turns(None) == read_turns(b"[]") == ()


@pytest.mark.parametrize("turns", ["what?", [["what?"]], [["what?", ""]], [["what?", 3]], [{"q": "what?", "a": "it"}]])
def test_other_values_are_refused(turns: object) -> None:
    with pytest.raises(ValueError, match="field 'turns'"):
        read_turns(json.dumps({"turns": turns}).encode())
