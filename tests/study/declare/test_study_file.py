"""A study file is read whole or refused with file, line, key and the nearest valid name."""

import pytest
import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.claims import LR_SENSITIVITY, Claim
from lightning_moevlm.study.declare.comparison import Decision, DidNotLearn, Divergence, Guard, Primary
from lightning_moevlm.study.declare.study_file import read_study
from tests.study.refusals import assert_refused

GOOD = """\
question: Does it help?
hypothesis: >
  It does,
  a little.
base: [base.yaml]
arms:
  baseline: {description: as it is}
  no_z:
    description: without
    model.losses.router_z: null
    model:
      backbone: {init_args: {dim: 32, sparse_modalities: []}}
  hot: {model.optimizer.init_args.lr: 1e-2}
seeds: [0, 1]
budget: {max_steps: 10}
primary: {metric: val/task_loss}
also: [val/accuracy_text]
diverged: {times_untrained: 1.5}
decide: {alpha: 0.1}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.yaml").write_text("seed_everything: 0\n")

    def write(text: str):
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return file

    return write


def test_whole_study(write, tmp_path):
    study = read_study(write(GOOD))
    assert (study.comparison.name, study.comparison.question, study.comparison.hypothesis) == (
        "study",
        "Does it help?",
        "It does, a little.",
    )
    assert study.base == (tmp_path / "base.yaml",)  # found beside the study file
    assert study.comparison.baseline == "baseline"
    assert [arm.name for arm in study.comparison.arms] == ["baseline", "no_z", "hot"]
    assert study.comparison.arms[1].changes == {
        "model": {
            "losses": {"router_z": None},
            "backbone": {"init_args": {"dim": 32, "sparse_modalities": []}},
        }
    }
    assert study.comparison.arms[2].changes == {"model": {"optimizer": {"init_args": {"lr": 0.01}}}}  # 1e-2 is a number
    assert study.comparison.seeds == (0, 1)
    assert study.budget.max_steps == 10
    assert study.comparison.primary == Primary("val/task_loss", "lower")  # the direction is declared in metric_keys.py
    assert study.comparison.diverged == Divergence("val/task_loss", 1.5)
    assert study.comparison.decide.alpha == 0.1


def test_a_metric_that_is_better_when_higher_does_not_define_a_divergence(write):
    text = GOOD.replace("primary: {metric: val/task_loss}", "primary: {metric: val/accuracy_text}")
    assert read_study(write(text)).comparison.diverged == Divergence("val/task_loss", 1.5)
    undeclared = read_study(write(text.replace("diverged: {times_untrained: 1.5}\n", ""))).comparison
    assert undeclared.diverged.metric == "val/task_loss"


def test_how_a_verdict_is_reached(write):
    assert read_study(write(GOOD)).comparison.decide == Decision(alpha=0.1, test="t", correction="none", within=None)
    assert read_study(write(GOOD.replace("decide: {alpha: 0.1}\n", ""))).comparison.decide == Decision(alpha=0.05)
    decide = "decide: {test: wilcoxon, correction: holm, within: 1e-2}"
    study = read_study(write(GOOD.replace("decide: {alpha: 0.1}", decide)))
    assert study.comparison.decide == Decision(0.05, "wilcoxon", "holm", 0.01)


def test_rules_of_learning(write):
    assert read_study(write(GOOD)).comparison.did_not_learn is None
    rule = "did_not_learn: {share_of_healthy: 0.8, stalled_steps: 4}\n"
    assert read_study(write(GOOD + rule)).comparison.did_not_learn == DidNotLearn(
        "val/task_loss", "lower", "baseline", share_of_healthy=0.8, stalled_steps=4
    )
    rule = "did_not_learn: {metric: val/accuracy_text, no_better_than: val/majority_text, "
    rule += "share_of_healthy: 1, healthy: hot}\n"
    found = read_study(write(GOOD + rule)).comparison.did_not_learn
    assert found == DidNotLearn("val/accuracy_text", "higher", "hot", 1.0, "val/majority_text")
    assert found.text == (
        "val/accuracy_text: ended at less than 1 of the way of hot at the same seed, or no better than "
        "val/majority_text at the end"
    )


def test_guard(write):
    assert read_study(write(GOOD)).comparison.guard == ()
    guard = "guard:\n- {metric: val/accuracy_text, at_most: 0.01}\n"
    guard += "- {metric: val/majority_text, direction: lower, at_most: 0}\n"
    assert read_study(write(GOOD + guard)).comparison.guard == (
        Guard("val/accuracy_text", "higher", 0.01),  # the direction is declared in metric_keys.py
        Guard("val/majority_text", "lower", 0.0),
    )


CLAIMS = """claims:
- {says: No cost., arm: no_z, expect: same, within: 0.1}
- {says: It is off., arm: hot, against: no_z, metric: learning_rate_sensitivity, expect: lower, control: true}
- {says: Text first., arm: hot, metric: val/accuracy_text, against_metric: val/majority_text, expect: higher}
"""


def test_claims(write):
    assert read_study(write(GOOD)).comparison.claims == ()
    loss, accuracy = "val/task_loss", ("val/accuracy_text", "val/majority_text")
    assert read_study(write(GOOD + CLAIMS)).comparison.claims == (
        Claim("No cost.", "no_z", "baseline", loss, loss, "same", 0.1),
        Claim("It is off.", "hot", "no_z", LR_SENSITIVITY, LR_SENSITIVITY, "lower", is_control=True),
        Claim("Text first.", "hot", "baseline", *accuracy, "higher"),
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("arm: no_z", "arm: nozz", 21, ["did you mean 'no_z'?", "allowed: baseline, no_z, hot"]),
        ("arm: no_z", "arm: baseline", 21, ["val/task_loss of baseline is compared with itself"]),
        ("expect: same", "expect: lower", 21, ["`within` goes with `expect: same` alone"]),
        (", within: 0.1", "", 21, ["`expect: same` needs `within`"]),
        ("metric: val/acc", "metric: val/ac", 23, ["unknown metric", "did you mean 'val/accuracy"]),
        (
            "against_metric: val/majority_text",
            "against_metric: learning_rate_sensitivity",
            23,
            ["compared with itself alone"],
        ),
        ("control: true", "control: maybe", 22, ["expected a true | false, got"]),
    ],
)
def test_claims_that_no_run_could_decide_are_refused(write, old, new, line, words):
    assert old in CLAIMS
    assert_refused(write(GOOD + CLAIMS.replace(old, new, 1)), line, words)


def test_shipped_study_is_valid():
    from pathlib import Path

    study = read_study(Path(__file__).parents[3] / "ablations" / "quickstart.yaml")
    assert [arm.name for arm in study.comparison.arms] == ["baseline", "no_load_balance", "no_router_z", "dense_twin"]
    assert all(arm.description for arm in study.comparison.arms)
    assert len(study.comparison.seeds) == 3


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "seeds: [0, 1]",
            "sedes: [0, 1]",
            14,
            ["unknown key 'sedes'", "did you mean 'seeds'?", "allowed here"],
        ),
        ("seeds: [0, 1]\n", "", 1, ["'seeds' is missing"]),
        ("seeds: [0, 1]", "seeds: [0, 0]", 14, ["seed 0 occurs twice"]),
        ("seeds: [0, 1]", "seeds: []", 14, ["seeds: expected a list", "an empty list"]),
        ("seeds: [0, 1]", "seeds: 2", 14, ["seeds: expected a list", "; write seeds: [0, 1, 2]"]),
        ("seeds: [0, 1]", "seeds: [0, -1]", 14, ["seeds[1]: expected a whole number >= 0, got '-1'"]),
        ("max_steps: 10", "max_step: 10", 15, ["budget.max_step", "did you mean 'max_steps'?"]),
        (
            "max_steps: 10",
            "max_steps: ten",
            15,
            ["budget.max_steps: expected a whole number >= 1, got 'ten'"],
        ),
        ("max_steps: 10", "max_steps: true", 15, ["expected a whole number"]),
        (
            "metric: val/task_loss",
            "metric: val/tsk_loss",
            16,
            ["unknown metric 'val/tsk_loss'", "'val/task_loss'"],
        ),
        ("metric: val/task_loss", "metric: val/majority_text", 16, ["add `direction: lower`"]),
        (
            "{metric: val/task_loss}",
            "{metric: val/task_loss, direction: down}",
            16,
            ["got 'down'", "lower, higher"],
        ),
        ("also: [val/accuracy_text]", "also: val/accuracy_text", 17, ["also: expected a list"]),
        ("times_untrained: 1.5", "times_untrained: 0", 18, ["expected a number > 0, got '0'"]),
        ("times_untrained: 1.5", "in_a_row: 0", 18, ["diverged.in_a_row: expected a whole number >= 1, got '0'"]),
        ("decide:", "futility_stop: {at_step: 10, worse_by: 1}\ndecide:", 19, ["step 10 is not before the end"]),
        ("decide:", "futility_stop: {at_step: 3, worse_by: 0}\ndecide:", 19, ["expected a number > 0, got '0'"]),
        ("decide:", "futility_stop: {at_step: 3}\ndecide:", 19, ["futility_stop: the key 'worse_by' is missing"]),
        ("decide:", "futilty_stop: {at_step: 3}\ndecide:", 19, ["did you mean 'futility_stop'?"]),
        ("decide:", "did_not_learn: {}\ndecide:", 19, ["no rule is set", "share_of_healthy, no_better_than, stalled"]),
        ("decide:", "did_not_learn: {share_of_healthy: 2}\ndecide:", 19, ["a number above 0, at most 1, got '2'"]),
        ("decide:", "did_not_learn: {share_of_healhty: 0.5}\ndecide:", 19, ["did you mean 'share_of_healthy'?"]),
        (
            "decide:",
            "did_not_learn: {stalled_steps: 3, healthy: hot}\ndecide:",
            19,
            ["did_not_learn.healthy: the healthy arm is the measure of share_of_healthy alone"],
        ),
        (
            "decide:",
            "did_not_learn: {share_of_healthy: 0.5, healthy: hto}\ndecide:",
            19,
            ["got 'hto'", "did you mean 'hot'?", "baseline, no_z, hot"],
        ),
        ("decide:", "did_not_learn: {stalled_steps: 10}\ndecide:", 19, ["no value before its last 10 steps"]),
        (
            "decide:",
            "did_not_learn: {no_better_than: val/majority_text}\ndecide:",
            19,
            ["val/majority_text (fraction) cannot be compared with val/task_loss (sum of term losses); set `metric`"],
        ),
        (
            "decide:",
            "did_not_learn: {no_better_than: val/task_loss}\ndecide:",
            19,
            ["val/task_loss is compared with itself"],
        ),
        (
            "decide:",
            "did_not_learn: {metric: val/majority_text, stalled_steps: 3}\ndecide:",
            19,
            ["not declared whether lower or higher val/majority_text is better"],
        ),
        ("alpha: 0.1", "alpha: 5", 19, ["expected a number between 0 and 1, got '5'"]),
        ("alpha: 0.1", "test: ttest", 19, ["decide.test: got 'ttest'", "allowed: t, wilcoxon, sign"]),
        ("alpha: 0.1", "correction: hlm", 19, ["did you mean 'holm'?", "none, holm"]),
        ("alpha: 0.1", "within: 0", 19, ["decide.within: expected a number > 0, got '0'"]),
        ("decide:", "guard: [{metric: val/task_los, at_most: 1}]\ndecide:", 19, ["guard[0].metric", "'val/task_loss'"]),
        ("decide:", "guard: [{metric: val/task_loss, at_most: -1}]\ndecide:", 19, ["expected a number >= 0, got '-1'"]),
        ("decide:", "guard: [{metric: val/task_loss}]\ndecide:", 19, ["guard[0]: the key 'at_most' is missing"]),
        (
            "base: [base.yaml]",
            "base: [bse.yaml]",
            5,
            ["base[0]: there is no configuration file bse.yaml; did you mean base.yaml? the shipped"],
        ),
        ("description: as it is", "model.losses.router_z: null", 7, ["the baseline changes nothing"]),
        (
            "    model:\n",
            "    model.losses: {router_z: null}\n    model:\n",
            11,
            ["'model.losses.router_z' is set twice"],
        ),
        ("    model:\n", "    model.losses.router_z.weight: 1\n    model:\n", 11, ["plain value"]),
        ("model.losses.router_z", "trainer.max_steps", 10, ["set by budget.max_steps"]),
        ("model.losses.router_z", "seed_everything", 10, ["set by seeds"]),
        ("model.losses.router_z", "data.seed", 10, ["'data.seed' may not differ between arms", "set by seeds"]),
        ("model.losses.router_z: null", "model.seed: 3", 10, ["'model.seed' may not differ", "set by seeds"]),
        ("seeds: [0, 1]", "seeds: [0, 4294967296]", 14, ["seeds[1]: expected a seed below 2**32"]),
        ("  no_z:\n", f"  {'n' * 65}:\n", 8, ["at most 64 characters, this one has 65"]),
        ("model.losses.router_z", "trainer.logger.init_args.run_name", 10, ["may not differ between arms"]),
        (
            "model.losses.router_z: null",
            "trainer.callbacks: [Mine]",
            10,
            ["would replace the callbacks that measure and guard every run; write trainer.callbacks+ to add"],
        ),
        ("model.losses.router_z: null", "trainer.callbacks+: Mine", 10, ["expected a list with at least one entry"]),
        ("model.losses.router_z", "model..router_z", 10, ["empty part"]),
        ("  no_z:\n", "  no z:\n", 8, ["an arm's name is letters, digits and _"]),
        ("  hot:", "  no_z:", 13, ["the key 'no_z' occurs twice (first in line 8)"]),
        ("question: Does it help?", "question: [no]", 1, ["question: expected a text"]),
        ("question: Does it help?", "question: no", 1, ["got 'no', which YAML reads as False; put it in quotes"]),
        (
            "question: Does it help?",
            "baseline: nozz\nquestion: x",
            1,
            ["did you mean 'no_z'?", "baseline, no_z, hot"],
        ),
        ("arms:\n", "arms: &a\n  - b\nbogus:\n", 8, ["unknown key 'bogus'"]),
        ("seeds: [0, 1]", "seeds: [0, 1", 15, ["not valid YAML"]),
        ("seeds: [0, 1]", " seeds: [0, 1]", 14, ["not valid YAML", "keys of one mapping begin in the same column"]),
        ("seeds: [0, 1]", "trainer.precision: x", 14, ["unknown key", "stand in an arm, in a level of a factor"]),
        ("dim: 32", "dim: !!python/object/apply:os.getcwd []", 12, ["could not determine a constructor"]),
    ],
)
def test_refusals_name_file_line_key_and_nearest(write, old, new, line, words):
    assert old in GOOD
    assert_refused(write(GOOD.replace(old, new, 1)), line, words)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n", "\x00"])
def test_files_that_are_not_a_study(write, text):
    with pytest.raises(UserError, match=r"study\.yaml"):
        read_study(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        read_study(tmp_path / "gone.yaml")


def test_name_of_the_file_is_the_name_of_the_study(tmp_path):
    (tmp_path / "base.yaml").write_text("")
    file = tmp_path / "my study.yaml"
    file.write_text(GOOD)
    with pytest.raises(UserError, match="letters, digits and _"):
        read_study(file)
    file = tmp_path / f"{'s' * 65}.yaml"
    file.write_text(GOOD)
    with pytest.raises(UserError, match="has 65 characters; use at most 64"):
        read_study(file)


def test_every_truncation_is_refused_or_read(write):
    """No prefix of a study file ever ends in anything but a study or a one-line refusal."""
    for length in range(0, len(GOOD), 7):
        try:
            read_study(write(GOOD[:length]))
        except UserError as error:
            assert "\n" not in str(error)
    assert yaml.safe_load(GOOD)
