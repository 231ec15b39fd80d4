"""The faster parser of the tests answers as jsonargparse does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import ConfigResolver
from tests import fast_parser
from tests.conftest import PROJECT

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
    return answers(FILES)


def test_configurations_and_mistakes_are_those_of_jsonargparse(fast: list[object], as_it_is: None) -> None:
    assert fast_parser._subcommands.find_action_and_subcommand is not fast_parser.find_action_and_subcommand
    assert answers(FILES) == fast
