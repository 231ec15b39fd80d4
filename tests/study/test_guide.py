"""The description of study files matches the reader: every key, every example, every design."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.declare.decode import describe_keys
from lightning_moevlm.study.declare.designs.design_keys import DESIGNS
from lightning_moevlm.study.declare.study_file import Study, read_study
from lightning_moevlm.study.declare.study_keys import StudyFile
from lightning_moevlm.study.guide import skeleton, study_rows
from tests.study.refusals import assert_refused
from tests.study.tiny_study import plan_of, write_project

SKELETON = skeleton("mine.yaml")
OPTIONAL = [key.key for key in describe_keys(StudyFile) if re.search(rf"^#{key.key}:", SKELETON, flags=re.MULTILINE)]


def read_text(folder: Path, text: str) -> Study:
    file = folder / "mine.yaml"
    file.write_text(text)
    return read_study(file)


def uncommented(text: str, name: str) -> str:
    return re.sub(rf"^#{name}:.*\n(#[ ].*\n)*", lambda found: re.sub("(?m)^#", "", found[0]), text, flags=re.MULTILINE)


def test_the_required_keys_of_a_study() -> None:
    needed = [row.key for row in study_rows() if row.default == "required" and "." not in row.key]
    assert needed == ["question", "base", "seeds", "budget", "primary"]
    assert all(row.type and row.meaning.endswith(".") for row in study_rows())


def test_a_new_study_file_is_read_and_has_every_key(tmp_path: Path) -> None:
    study = read_text(tmp_path, SKELETON)
    assert [arm.name for arm in study.comparison.arms] == ["baseline", "no_router_z"]
    set_here = set(yaml.safe_load(SKELETON))
    assert set_here | set(OPTIONAL) == {key.key for key in describe_keys(StudyFile)}
    assert len(OPTIONAL) > 10


@pytest.mark.parametrize("name", [name for name in OPTIONAL if name not in ("factors", "design")])
def test_an_optional_key_of_a_new_study_file_can_be_set(tmp_path: Path, name: str) -> None:
    text = uncommented(SKELETON, name)
    assert name in yaml.safe_load(text)
    read_text(tmp_path, text)


def test_a_new_study_file_becomes_a_designed_one(tmp_path: Path) -> None:
    text = re.sub(r"^arms:\n(  .*\n)+", "", uncommented(uncommented(SKELETON, "factors"), "design"), flags=re.MULTILINE)
    assert len(read_text(tmp_path, text).comparison.arms) == 4


@pytest.mark.parametrize("kind", DESIGNS)
def test_the_example_of_a_design_is_read(tmp_path: Path, kind: str) -> None:
    page = DESIGNS[kind]
    names = {"fractional_factorial": "abcd", "product": "ab"}.get(kind, ("qk_norm", "router_z"))
    factors = {name: {"on": {f"model.{name}": True}} for name in names}
    design = yaml.safe_load(page.example)
    file = write_project(tmp_path, "sqlite://", {"factors": factors, "design": design})
    declared = yaml.safe_load(file.read_text())
    del declared["arms"]
    file.write_text(yaml.safe_dump(declared))
    study = read_study(file)
    assert study.comparison.design is not None
    assert (study.comparison.design.kind, len(study.comparison.arms) > 2) == (kind, True)


def project(folder: Path, **study: object) -> Path:
    folder.mkdir()
    arms = {"baseline": None, "fast": {"model.speed": 0.9}, "own": {"model.worse": 0.5}}
    return write_project(folder, "sqlite:///nowhere", {"arms": arms, **study})


def test_a_value_for_all_arms_is_over_the_base_and_below_an_arm(tmp_path: Path) -> None:
    file = project(tmp_path / "one", all_arms={"model.worse": 0.25, "model": {"skew": 0.2}})
    plan = plan_of(file)
    values = {run.arm: (run.resolved["model"]["worse"], run.resolved["model"]["skew"]) for run in plan.runs}
    assert values == {"baseline": (0.25, 0.2), "fast": (0.25, 0.2), "own": (0.5, 0.2)}
    assert {run.overrides["model"]["skew"] for run in plan.runs} == {0.2}  # what a run is started with
    assert flatten_values(plan.comparison.arms[1].changes) == {
        "model.speed": 0.9
    }  # an arm differs in what it says itself

    other = project(tmp_path / "two")
    base = yaml.safe_load((tmp_path / "two/base.yaml").read_text())
    base["model"] |= {"worse": 0.25, "skew": 0.2}
    (tmp_path / "two/base.yaml").write_text(yaml.safe_dump(base))
    assert [run.digest for run in plan_of(other).runs] == [run.digest for run in plan.runs]  # as if the base said it


def test_items_for_a_list_of_all_arms_join_those_of_an_arm(tmp_path: Path) -> None:
    arms = {"baseline": None, "more": {"trainer.callbacks+": ["B"]}}
    file = project(tmp_path / "one", arms=arms, all_arms={"trainer.callbacks+": ["A"]})
    overrides = {run.arm: run.overrides["trainer"]["callbacks+"] for run in plan_of(file).runs}
    assert overrides == {"baseline": ["A"], "more": ["A", "B"]}


def test_keys_that_the_study_sets_are_refused_for_all_arms_too(tmp_path: Path) -> None:
    file = project(tmp_path / "one", all_arms={"trainer.max_steps": 3})
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "trainer.max_steps" in text)
    assert_refused(file, line, ["all_arms.trainer.max_steps", "set by budget.max_steps"])
