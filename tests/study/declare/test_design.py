"""Designs by hand: their arms, names and changes; refusals name their place."""

from pathlib import Path

import pytest
import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.designs.design_keys import LADDER_RATES
from lightning_moevlm.study.declare.designs.read_design import rate_name
from lightning_moevlm.study.declare.factors import FactorLevel
from lightning_moevlm.study.declare.study_file import Study, read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.report.plan_records import plan_records
from lightning_moevlm.study.report.tables.plan_tables import plan_table
from tests.study.refusals import assert_refused
from tests.study.tiny_study import describe, plan_of, resolve, write_project

HEAD = """\
question: Does it help?
base: [base.yaml]
seeds: [0]
budget: {max_steps: 10}
primary: {metric: val/task_loss}
"""
FACTORS = """\
factors:
  a:
    description: the first
    on: {model.a: 1}
  b:
    off: {model.b: null}
  c:
    on: {model.c: {x: 1, y: 2}}
"""
ROUTER = """\
  router:
    levels:
      plain: {}
      noisy: {description: with noise, model.router: noisy}
      hash: {model.router: hash}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.yaml").write_text("seed_everything: 0\n")

    def write(text: str):
        file = tmp_path / "study.yaml"
        file.write_text(HEAD + text)
        return file

    return write


def arms(study: Study) -> dict[str, dict]:
    return {arm.name: arm.changes for arm in study.comparison.arms}


def test_one_in(write):
    study = read_study(write(FACTORS + ROUTER + "design: one_in\n"))
    # the reference is every factor at its first level: a off, b off (which is a change), c off, router plain
    off = {"model": {"b": None}}
    assert arms(study) == {
        "baseline": off,
        "a": {"model": {"a": 1, "b": None}},
        "b": {},
        "c": {"model": {"b": None, "c": {"x": 1, "y": 2}}},
        "router_noisy": {"model": {"b": None, "router": "noisy"}},
        "router_hash": {"model": {"b": None, "router": "hash"}},
    }
    assert study.comparison.baseline == "baseline"
    told = {arm.name: arm.description for arm in study.comparison.arms}
    assert told["baseline"] == "The reference: a, b, c off; router plain."
    assert (told["a"], told["b"]) == ("with the first.", "with b.")
    assert (told["router_noisy"], told["router_hash"]) == ("with noise.", "router hash.")
    assert study.comparison.arms[1].levels == (
        FactorLevel("a", "on"), FactorLevel("b", "off"), FactorLevel("c", "off"), FactorLevel("router", "plain"),
    )  # fmt: skip


def test_factors_may_each_add_to_a_list(write):
    study = read_study(
        write(
            "factors: {a: {on: {trainer.callbacks+: [A]}}, b: {on: {trainer.callbacks+: [B, C]}}}\ndesign: factorial\n"
        )
    )
    assert arms(study) == {
        "baseline": {},
        "b": {"trainer": {"callbacks+": ["B", "C"]}},
        "a": {"trainer": {"callbacks+": ["A"]}},
        "a__b": {"trainer": {"callbacks+": ["A", "B", "C"]}},
    }


def test_leave_one_out(write):
    study = read_study(write(FACTORS + "design: leave_one_out\n"))
    assert arms(study) == {
        "baseline": {"model": {"a": 1, "c": {"x": 1, "y": 2}}},
        "no_a": {"model": {"c": {"x": 1, "y": 2}}},
        "no_b": {"model": {"a": 1, "b": None, "c": {"x": 1, "y": 2}}},
        "no_c": {"model": {"a": 1}},
    }
    assert [arm.description for arm in study.comparison.arms][:2] == [
        "The reference: a, b, c on.",
        "without the first.",
    ]


def test_factorial(write):
    study = read_study(write(FACTORS + "design: factorial\n"))
    assert list(arms(study)) == ["baseline", "c", "b", "b__c", "a", "a__c", "a__b", "a__b__c"]
    assert arms(study)["a__b"] == {"model": {"a": 1}}
    assert study.comparison.arms[-1].description == "with the first; with b; with c."


def test_fractional_factorial_prints_its_aliases(write):
    study = read_study(write(FACTORS + "design: {fractional_factorial: {generators: {c: [a, b]}}}\n"))
    # c is on where one of a and b is: in this order of the runs, bit 0 is a and bit 1 is b
    assert list(arms(study)) == ["baseline", "a__c", "b__c", "a__b"]
    design = study.comparison.design
    assert design is not None
    assert [fraction.aliases() for fraction in design.fractions] == [("a = -b*c", "b = -a*c", "c = -a*b")]
    same = read_study(write(FACTORS + "design: {fractional_factorial: {resolution: 3}}\n"))
    assert arms(same) == arms(study)


def test_grid(write):
    study = read_study(write(FACTORS + ROUTER + "design: grid\n"))
    assert len(study.comparison.arms) == 2 * 2 * 2 * 3
    assert list(arms(study))[:2] == ["router_plain", "router_noisy"]  # levels are always told, in a grid
    assert list(arms(study))[-1] == "a__b__c__router_hash"


def test_lr_sensitivity(write):
    text = "factors: {a: {on: {model.a: 1}}}\ndesign: {lr_sensitivity: {rates: [3e-4, 0.0025]}}\nbaseline: lr_2_5e_3\n"
    study = read_study(write(text))
    rate = {"optimizer": {"init_args": {"lr": 0.0003}}}
    assert list(arms(study)) == ["lr_3e_4", "lr_2_5e_3", "a__lr_3e_4", "a__lr_2_5e_3"]
    assert arms(study)["a__lr_3e_4"] == {"model": {"a": 1, **rate}}
    assert study.comparison.baseline == "lr_2_5e_3"
    assert study.comparison.arms[3].levels == (FactorLevel("a", "on"), FactorLevel("lr", "2_5e_3"))
    published = read_study(write("design: lr_sensitivity\n"))
    assert [arm.changes["model"]["optimizer"]["init_args"]["lr"] for arm in published.comparison.arms] == list(
        LADDER_RATES
    )


def test_size_ladder_with_its_own_keys(write):
    text = "design: {size_ladder: {levels: {w32: {model.dim: 32, model.heads: 2}, w64: {}}}}\n"
    assert arms(read_study(write(text))) == {"size_w32": {"model": {"dim": 32, "heads": 2}}, "size_w64": {}}


def test_product(write):
    text = """\
design:
  product:
  - leave_one_out: {factors: [a, b]}
  - one_in: {factors: [c]}
  - size_ladder: {factors: [], levels: {w32: {model.dim: 32}, w64: {}}}
"""
    study = read_study(write(FACTORS + text))
    assert list(arms(study)) == [
        "size_w32", "size_w64", "c__size_w32", "c__size_w64",
        "no_a__size_w32", "no_a__size_w64", "no_a__c__size_w32", "no_a__c__size_w64",
        "no_b__size_w32", "no_b__size_w64", "no_b__c__size_w32", "no_b__c__size_w64",
    ]  # fmt: skip
    assert {level.factor for level in study.comparison.arms[0].levels} == {"a", "b", "c", "size"}


@pytest.mark.parametrize(
    ("rate", "name"), [(3e-4, "3e_4"), (0.1, "1e_1"), (2.5e-3, "2_5e_3"), (1.0, "1"), (1.5, "1_5"), (10.0, "10")]
)
def test_names_of_rates(rate, name):
    assert rate_name(rate) == name


MANY = "factors:\n" + "".join(f"  f{i}: {{on: {{model.f{i}: 1}}}}\n" for i in range(16))
LONG = "factors:\n" + "".join(f"  {c * 30}: {{on: {{model.{c}: 1}}}}\n" for c in "abc")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, ["names nothing to compare", "`arms`, or `factors` and a `design`"]),
        (FACTORS, 1, ["needs a `design`, e.g. one_in"]),
        ("arms: {x: {}}\ndesign: one_in\n", 7, ["design: a study has either `arms` or `factors`"]),
        ("arms: {x: {}}\nfactors: {a: {on: {model.a: 1}}}\n", 7, ["factors: a study has either"]),
        ("design: one_in\n", 6, ["one_in needs factors"]),
        (FACTORS + "design: one_inn\n", 14, ["got 'one_inn'", "did you mean 'one_in'?", "allowed: one_in"]),
        (FACTORS + "design: {one_inn: {}}\n", 14, ["unknown design 'one_inn'", "did you mean 'one_in'?"]),
        (FACTORS + "design:\n  one_in: {}\n  grid: {}\n", 16, ["one design only", "product:"]),
        (FACTORS + "design: {one_in: {factor: [a]}}\n", 14, ["unknown key 'factor'", "did you mean 'factors'?"]),
        (FACTORS + "design: {one_in: {factors: [a, bb]}}\n", 14, ["got 'bb'", "did you mean 'b'?", "a, b, c"]),
        (FACTORS + "design: {one_in: {factors: [a, a]}}\n", 14, ["factor 'a' is named twice"]),
        (FACTORS + "design: {one_in: {factors: [a]}}\n", 14, ["leaves out factor 'b'"]),
        (FACTORS + "  d: {on: {model.c.x: 3}}\ndesign: factorial\n", 14, [
            "factor 'd' sets 'model.c.x', and factor 'c' sets 'model.c.x' in line 13", "levels of one factor",
        ]),
        (FACTORS + "  d: {off: {model.c: null}}\ndesign: one_in\n", 14, ["'model.c'", "'model.c.x' in line 13"]),
        (FACTORS + "  d: {}\ndesign: one_in\n", 14, ["factors.d: this factor changes nothing"]),
        (FACTORS + "  d: {on: {}}\ndesign: one_in\n", 14, ["off and on are both the base"]),
        (FACTORS + "  d: {on: {model.d: 1}, levels: {x: {}}}\ndesign: one_in\n", 14, ["either `on` / `off`"]),
        (FACTORS + "  d: {levels: {x: {}}}\ndesign: one_in\n", 14, ["two levels or more"]),
        (FACTORS + "  d: {onn: {}}\ndesign: one_in\n", 14, ["unknown key 'onn'", "did you mean 'on'?"]),
        (FACTORS + "  d__e: {on: {model.d: 1}}\ndesign: one_in\n", 14, ["letters, digits and single _"]),
        (FACTORS + "  d: {on: {trainer.max_steps: 3}}\ndesign: one_in\n", 14, ["may not differ between arms"]),
        (FACTORS + "  d: {on: {model: {d: 1}, model.d: 2}}\ndesign: one_in\n", 14, ["set twice"]),
        (FACTORS + ROUTER + "design: factorial\n", 19, ["factor 'router' in line 14", "noisy, hash", "take grid"]),
        (FACTORS + ROUTER + "design: leave_one_out\n", 19, ["take one_in"]),
        (FACTORS + "design: fractional_factorial\n", 14, ["either `resolution` (3, 4 or 5) or `generators`"]),
        (FACTORS + "design: {fractional_factorial: {resolution: 4}}\n", 14, ["no part of the 8 combinations"]),
        (FACTORS + "design: {fractional_factorial: {resolution: 2}}\n", 14, ["a whole number >= 3"]),
        (FACTORS + "design: {fractional_factorial: {generators: {c: [a]}}}\n", 14, ["a and c would always change"]),
        (FACTORS + "design: {fractional_factorial: {generators: {d: [a, b]}}}\n", 14, ["unknown factor 'd'"]),
        (FACTORS + "design: {fractional_factorial: {generators: {c: [a, a]}}}\n", 14, ["occurs twice", "cancels out"]),
        (FACTORS + "design: {fractional_factorial: {generators: {c: [a, c]}}}\n", 14, ["got 'c'", "a, b"]),
        (MANY + "design: factorial\n", 23, ["65,536 arms, at most 1,024", "fractional_factorial"]),
        (MANY + "design: {fractional_factorial: {resolution: 3}}\n", 23, ["16 factors, at most 15"]),
        (LONG + "design: factorial\n", 10, ["94 characters, at most 64", "shorten the names of factors"]),
        (FACTORS + "design: {lr_sensitivity: {rates: [1e-2, 1e-3]}}\n", 14, ["rates ascend", "0.001 after 0.01"]),
        (FACTORS + "design: {lr_sensitivity: {rates: [1e-2]}}\n", 14, ["two rates or more"]),
        ("factors: {lr: {on: {model.a: 1}}}\ndesign: lr_sensitivity\n", 7, ["a factor 'lr' of its own", "line 6"]),
        ("factors: {a: {on: {model.optimizer.init_args.lr: 1}}}\ndesign: lr_sensitivity\n", 7, ["factor 'lr' sets"]),
        ("design: size_ladder\n", 6, ["size_ladder needs levels, e.g. design: {size_ladder: {levels:"]),
        (FACTORS + "design: {product: [{one_in: {factors: [a, b, c]}}]}\n", 14, ["two parts or more"]),
        (FACTORS + "design: {product: [one_in, factorial]}\n", 14, ["inside a product, one_in names its factors"]),
        (FACTORS + "design: {product: [{one_in: {factors: [a, b]}}, {grid: {factors: [b, c]}}]}\n", 14, [
            "factor 'b' is varied by one_in already",
        ]),
        (FACTORS + "design: {product: [{product: []}, {grid: {factors: [c]}}]}\n", 14, ["product within a product"]),
        (FACTORS + "design: one_in\nbaseline: d\n", 15, ["got 'd'", "baseline, a, b, c"]),
        ("factors: {no: {on: {model.a: 1}}, no_no: {on: {model.b: 1}}, x: {levels: {y: {}, z: {model.x: 1}}},"
         " x_z: {on: {model.z: 1}}}\ndesign: one_in\n", 7, ["two points of the design have the name 'x_z'"]),
    ],
)  # fmt: skip
def test_refusals_name_file_line_and_remedy(write, text, line, words):
    assert_refused(write(text), line, words)


def test_every_truncation_is_refused_or_read(write):
    whole = FACTORS + ROUTER + "design: {product: [{one_in: {factors: [a, b]}}, {grid: {factors: [c, router]}}]}\n"
    for length in range(0, len(whole), 5):
        try:
            read_study(write(whole[:length]))
        except UserError as error:
            assert "\n" not in str(error)


def test_a_plan_tells_levels_and_aliases(tmp_path):
    study = {
        "factors": {
            "fast": {"on": {"model.speed": 0.9}},
            "skewed": {"on": {"model.skew": 0.3}},
            "late": {"on": {"model.validate_every": 2}},
        },
        "design": {"fractional_factorial": {"resolution": 3}},
    }
    file = write_project(tmp_path, "sqlite:///x.db")
    declared = yaml.safe_load(file.read_text()) | study
    del declared["arms"]
    file.write_text(yaml.safe_dump(declared, sort_keys=False))
    plan = plan_of(file)
    assert {run.arm for run in plan.runs} == {"baseline", "fast__late", "skewed__late", "fast__skewed"}
    statuses = {run.folder: "waiting" for run in plan.runs}
    records = {record["arm"]: record for record in plan_records(plan, statuses)}
    assert records["fast__late"]["levels"] == {"fast": "on", "skewed": "off", "late": "on"}
    assert records["fast__late"]["changes"] == {"model.speed": 0.9, "model.validate_every": 2}
    notes = plan_table(plan, statuses).notes
    assert "4 of 8 combinations, resolution III; defining relation I = -fast*skewed*late" in notes
    assert "aliased: fast = -skewed*late" in notes


def test_an_error_of_one_factor_names_its_line(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {a: 0, b: 0, seed: '${seed_everything}'}\n")
    file = tmp_path / "study.yaml"
    file.write_text(HEAD + "factors:\n  a: {on: {model.a: 1}}\n  b: {on: {model.b: 1}}\ndesign: factorial\n")
    with pytest.raises(UserError, match=r"study\.yaml:8: arm 'b': no such thing"):
        plan_study(read_study(file), _strict, describe, tmp_path / "sweeps")


def _strict(files: list[Path], overrides: dict) -> dict:
    if overrides.get("model", {}).get("b"):
        raise UserError("no such thing")
    return resolve(files, overrides)
