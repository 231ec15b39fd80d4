"""The faster parser of the tests answers as jsonargparse does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import ConfigResolver
from tests import fast_parser
from tests.conftest import PROJECT
from tests.small_run import BACKBONE, SMALL

FILES = [PROJECT / "conf/quickstart.yaml", PROJECT / "conf/data/mixture.yaml"]


@pytest.fixture
def as_it_is() -> Iterator[None]:
    fast_parser.uninstall()
    yield
    fast_parser.install()


def answers(files: list[Path]) -> list[object]:
    resolver = ConfigResolver()
    mistakes = ({"trainer": {"max_step": 1}}, {"model": {"backbone": {"moe": {"router": "TopK"}}}}, {"data": 1})
    told = []
    for mistake in mistakes:
        with pytest.raises(UserError) as caught:
            resolver(files, mistake)
        told.append(str(caught.value))
    return [resolver(files, {"model": {"backbone": {"moe": {"router": "TopPRouter"}}}}), told]


@pytest.fixture
def fast() -> list[object]:
    assert fast_parser._subcommands.find_action_and_subcommand is fast_parser.find_action_and_subcommand
    fast_parser._answers.clear()
    first = answers(FILES)
    known = len(fast_parser._answers)
    assert answers(FILES) == first and len(fast_parser._answers) == known > 0  # the second time by memory alone
    return first


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, *words, "--print_config"])
    return capsys.readouterr().out


def test_command_lines_are_those_of_jsonargparse(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """References, which are written, are those of each command line: a flag replaces one."""
    words = ((), ("--data.image_size=64", f"{BACKBONE}.image_size=64"), ())
    fast = [printed(capsys, *more) for more in words]
    assert fast[0] == fast[2] != fast[1]
    fast_parser.uninstall()
    try:
        assert [printed(capsys, *more) for more in words[:2]] == fast[:2]
    finally:
        fast_parser.install()


def test_configurations_and_mistakes_are_those_of_jsonargparse(fast: list[object], as_it_is: None) -> None:
    assert fast_parser._subcommands.find_action_and_subcommand is not fast_parser.find_action_and_subcommand
    assert answers(FILES) == fast


def test_only_equal_values_of_equal_types_have_one_answer() -> None:
    values = (1, 1.0, True, "1", None, [1], (1,), {"dim": 1}, Namespace(dim=1))
    assert len({fast_parser._freeze(value) for value in values}) == len(values)
    assert fast_parser._freeze({"dim": [1, "a"]}) == fast_parser._freeze({"dim": [1, "a"]})
    for another_time_another in ({"router": "mine.yaml"}, [object()]):
        with pytest.raises(fast_parser._NotKeptError):
            fast_parser._freeze(another_time_another)
