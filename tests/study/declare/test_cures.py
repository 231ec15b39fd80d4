"""Cure studies by hand: their arms and changes; refusals name their place; healthy runs are the same in all of them."""

from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.study_file import Study, read_study
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.statistics.factor_effects import find_crossing
from tests.study.refusals import assert_refused
from tests.study.tiny_study import plan_of

STUDY = """\
question: What cures it?
base: [base.yaml]
seeds: [0, 1]
budget: {max_steps: 10}
primary: {metric: val/task_loss}
factors:
  warm: {description: a warm-up, on: {model.warm: 0.2}}
  clip: {on: {model.clip: 1.0}}
  norm: {on: {model.norm: true}}
"""
ILLNESS = "model: {lr: 0.02, norm: false, optimizer: {init_args: {beta: 0.999}}}\n"
DESIGN = "design: {cures: {illness: [fever.yaml]}}\n"


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(
        "seed_everything: 0\nmodel: {seed: '${seed_everything}', optimizer: {init_args: {beta: 0.9}}}\n"
    )
    (tmp_path / "fever.yaml").write_text(ILLNESS)

    def write(design: str = DESIGN, study: str = STUDY, name: str = "fever_study") -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(study + design)
        return file

    return write


def changes(study: Study) -> dict[str, dict[str, Any]]:
    return {arm.name: arm.changes.get("model", {}) for arm in study.comparison.arms}


def test_arms_of_a_cure_study(write) -> None:
    study = read_study(write())
    optimizer = {"init_args": {"beta": 0.999}}
    sick = {"lr": 0.02, "norm": False, "optimizer": optimizer}
    assert changes(study) == {
        "healthy": {},
        "sick": sick,
        "sick__warm": {**sick, "warm": 0.2},
        "sick__clip": {**sick, "clip": 1.0},
        "sick__norm": {"lr": 0.02, "norm": True, "optimizer": optimizer},  # the cure wins
        "sick__all": {"lr": 0.02, "optimizer": optimizer, "warm": 0.2, "clip": 1.0, "norm": True},
        "sick__all_but_warm": {"lr": 0.02, "optimizer": optimizer, "clip": 1.0, "norm": True},
        "sick__all_but_clip": {"lr": 0.02, "optimizer": optimizer, "warm": 0.2, "norm": True},
        "sick__all_but_norm": {**sick, "warm": 0.2, "clip": 1.0},
        "healthy__warm": {"warm": 0.2},
        "healthy__clip": {"clip": 1.0},
        "healthy__norm": {"norm": True},
    }
    assert study.comparison.baseline == "healthy"
    # its report compares arms: the combinations are too few for main effects
    assert find_crossing(study.comparison.design, {arm.name: arm.levels for arm in study.comparison.arms}) is None
    told = {arm.name: arm.description for arm in study.comparison.arms}
    assert told["sick"] == "with the illness fever."
    assert told["sick__warm"] == "with the illness fever; with a warm-up."
    assert told["healthy"] == "The reference: illness, warm, clip, norm off."


def test_parts_can_be_left_out(write) -> None:
    text = "all: [clip, warm], all_but: [], on_healthy: [norm], together: [[norm, warm]]"
    study = read_study(write(f"design: {{cures: {{illness: [fever.yaml], {text}}}}}\n"))
    assert list(changes(study)) == [
        "healthy", "sick", "sick__warm", "sick__clip", "sick__norm", "sick__warm__norm", "sick__all", "healthy__norm",
    ]  # fmt: skip
    none = "all: [], on_healthy: []"
    study = read_study(write(f"design: {{cures: {{illness: [fever.yaml], {none}}}}}\n"))
    assert list(changes(study)) == ["healthy", "sick", "sick__warm", "sick__clip", "sick__norm"]


def test_an_arm_that_would_repeat_another_is_left_out(write) -> None:
    text = "all: [warm, clip], together: [[warm, clip]], on_healthy: []"
    study = read_study(write(f"design: {{cures: {{illness: [fever.yaml], {text}}}}}\n"))
    # all is the pair, and all but warm is clip alone
    assert list(changes(study)) == ["healthy", "sick", "sick__warm", "sick__clip", "sick__norm", "sick__warm__clip"]


def test_a_dose_is_over_the_files(write, tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text("model: {lr: 0.03, depth: 24}\n")
    text = "illness: [fever.yaml, second.yaml], dose: {model.lr: 0.1}, signs: [attention_logit_max/block0]"
    study = read_study(write(f"design: {{cures: {{{text}, fresh_seeds: [8, 9]}}}}\n"))
    assert changes(study)["sick"] == {
        "lr": 0.1,
        "norm": False,
        "depth": 24,
        "optimizer": {"init_args": {"beta": 0.999}},
    }
    design = study.comparison.design
    assert design is not None and design.cure_study is not None
    assert design.cure_study == (("attention_logit_max/block0",), (8, 9), (), None)
    assert study.comparison.arms[1].description == "with the illness fever and second."


def test_recommendations_name_their_sources(write) -> None:
    def recommendations(text: str) -> object:
        design = read_study(
            write(f"design: {{cures: {{illness: [fever.yaml], recommendations: {text}}}}}\n")
        ).comparison.design
        assert design is not None and design.cure_study is not None
        return design.cure_study.recommendations

    assert recommendations("{norm: 'a paper, section 2', warm: another}") == (
        ("norm", "a paper, section 2"),
        ("warm", "another"),
    )
    assert recommendations("{}") == ()


def test_healthy_runs_are_the_same_in_every_study(write, tmp_path: Path) -> None:
    (tmp_path / "chill.yaml").write_text("model: {lr: 1.0e-6}\n")
    one: Plan = plan_of(write())
    two = plan_of(write("design: {cures: {illness: [chill.yaml]}}\n", name="chill_study"))
    shared = {run.digest for run in one.runs} & {run.digest for run in two.runs}
    healthy = {run.digest for run in one.runs if run.arm.startswith("healthy")}
    assert shared == healthy
    assert len(healthy) == 2 * 4


@pytest.mark.parametrize(
    ("design", "line", "words"),
    [
        ("design: cures\n", 10, ["cures needs illness", "`moevlm describe cures` explains it"]),
        (
            "design: {cures: {illness: [feve.yaml]}}\n",
            10,
            ["no configuration file feve.yaml", "did you mean fever.yaml"],
        ),
        (
            "design: {cures: {illness: [fever.yaml], all: [wram]}}\n",
            10,
            ["got 'wram'", "did you mean 'warm'?", "warm, clip, norm"],
        ),
        ("design: {cures: {illness: [fever.yaml], all: [warm, warm]}}\n", 10, ["'warm' is named twice"]),
        ("design: {cures: {illness: [fever.yaml], together: [[warm]]}}\n", 10, ["a combination has two cures or more"]),
        (
            "design: {cures: {illness: [fever.yaml], all: [warm], all_but: [clip]}}\n",
            10,
            ["got 'clip'", "allowed: warm"],
        ),
        (
            "design: {cures: {illness: [fever.yaml], recommendations: {wram: a paper}}}\n",
            10,
            ["no cure 'wram' is tried here", "did you mean 'warm'?", "warm, clip, norm"],
        ),
        (
            "design: {cures: {illness: [fever.yaml], recommendations: {warm: ''}}}\n",
            10,
            ["recommendations.warm: expected a text"],
        ),
        (
            "design: {cures: {illness: [fever.yaml], fresh_arms: [sick__warm]}}\n",
            10,
            ["no seeds to repeat them on", "`fresh_seeds`"],
        ),
        (
            "design: {cures: {illness: [fever.yaml], fresh_seeds: [8], fresh_arms: [sick__wram]}}\n",
            10,
            ["got 'sick__wram'", "did you mean 'sick__warm'?"],
        ),
        ("design: {cures: {illness: [fever.yaml], fresh_seeds: [1, 2]}}\n", 3, ["seed 1 is one of `fresh_seeds` too"]),
        ("design: {cures: {illness: [fever.yaml], dose: {trainer.max_steps: 3}}}\n", 10, ["set by budget.max_steps"]),
        (
            "  other: {on: {model.clip: 2.0}}\n" + DESIGN,
            10,
            ["factor 'clip' sets 'model.clip' in line 8", "leave one out of `all`"],
        ),
        ("  all: {on: {model.all: 2.0}}\n" + DESIGN, 11, ["may not have the name 'all' (line 10)"]),
        ("  no: {off: {model.no: 2.0}}\n" + DESIGN, 11, ["cure 'no' (line 10) sets `off`", "give `on` alone"]),
        (
            "  lion: {on: {model.optimizer: Lion}}\n" + DESIGN,
            10,
            [
                "'model.optimizer' would also undo what",
                "fever.yaml:1 sets 'model.optimizer.init_args.beta'",
                "model.optimizer.class_path",
            ],
        ),
        (
            "  lr: {on: {model.lr.low: 1.0}}\n" + DESIGN,
            10,
            ["'model.lr.low' would undo what", "fever.yaml:1 sets 'model.lr'"],
        ),
        ("  r: {levels: {a: {}, b: {model.r: 1}}}\n" + DESIGN, 11, ["cures takes switches", "make it a switch"]),
        (
            "design: {product: [{cures: {factors: [warm], illness: [fever.yaml]}}, {one_in: {factors: [norm]}}]}\n",
            10,
            [
                "a whole study, not a part of a product",
            ],
        ),
    ],
)
def test_refusals(write, design: str, line: int, words: list[str]) -> None:
    assert_refused(write(design), line, words)


def test_an_illness_file_may_not_set_what_the_study_sets(write, tmp_path: Path) -> None:
    (tmp_path / "fever.yaml").write_text("model: {lr: 1}\ntrainer:\n  max_steps: 5\n")
    with pytest.raises(UserError, match=r"fever.yaml:3: trainer.max_steps: .*set by budget.max_steps"):
        read_study(write())


@pytest.mark.parametrize(
    ("cure", "words"),
    [
        ("{model.lr: 0.02}", "'sick' and 'sick__nothing' are the same run .* or remove the arm"),
        (
            "{model.optimizer.init_args.beta: 0.9}",
            "'healthy' and 'healthy__nothing' are the same run .* cure out of `on_healthy`",
        ),
    ],
)
def test_a_cure_that_changes_nothing_is_refused_when_planned(write, cure: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_of(write(study=f"{STUDY}  nothing: {{on: {cure}}}\n"))
