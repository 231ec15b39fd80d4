"""Identity of a run: changes that move it, changes that do not, and refusals before anything starts."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.plan.run_identity import COSMETIC_KEYS, compute_digest
from lightning_moevlm.study.report.tables.plan_tables import plan_table
from tests.study.tiny_study import describe, plan_of, resolve, write_project

CONFIG = {
    "seed_everything": 0,
    "model": {"dim": 8, "losses": {"router_z": None}},
    "data": {"root": "a", "cache_gib": 50.0},
    "trainer": {
        "max_steps": 5,
        "logger": {"init_args": {"run_name": "a"}},
        "default_root_dir": "x",
        "callbacks": [
            {"class_path": "a.RichProgressBar", "init_args": {"refresh_rate": 1}},
            {"class_path": "lightning_moevlm.training.callbacks.StepProgress"},
            {"class_path": "lightning_moevlm.training.callbacks.ResultTable"},
            {"class_path": "a.Guard"},
        ],
    },
}


def changed(dotted: str, value: object) -> dict:
    import copy

    config = copy.deepcopy(CONFIG)
    *path, last = dotted.split(".")
    here = config
    for part in path:
        here = here.setdefault(part, {})
    here[last] = value
    return config


def test_digest_by_hand():
    import hashlib

    text = '{"a":1,"trainer":{"callbacks":[],"max_steps":2}}'
    config = {"trainer": {"max_steps": 2, "callbacks": [], "logger": True}, "a": 1}
    assert compute_digest(config) == hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("cosmetic", [c.name for c in COSMETIC_KEYS])
def test_cosmetic_keys_do_not_change_identity(cosmetic):
    assert compute_digest(changed(cosmetic, "something else")) == compute_digest(CONFIG)


def test_progress_bars_are_cosmetic_and_other_callbacks_are_not():
    guard = {"class_path": "a.Guard"}
    assert compute_digest(changed("trainer.callbacks", [guard])) == compute_digest(CONFIG)
    assert compute_digest(changed("trainer.callbacks", [guard, guard])) != compute_digest(CONFIG)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("seed_everything", 1),
        ("model.dim", 9),
        ("model.losses.router_z", {"weight": 1}),
        ("trainer.max_steps", 6),
        ("data.root", "b"),
        ("ckpt_path", "pretrained.ckpt"),
    ],
)
def test_everything_else_changes_identity(dotted, value):
    assert compute_digest(changed(dotted, value)) != compute_digest(CONFIG)


def test_a_class_of_this_package_that_moves_is_the_same_experiment():
    router = {
        "class_path": "lightning_moevlm.model.routers.TopKRouter",
        "init_args": {"gates": [{"class_path": "lightning_moevlm.a.Gate"}]},
    }
    moved = {
        "class_path": "lightning_moevlm.model.routers.learned.TopKRouter",
        "init_args": {"gates": [{"class_path": "Gate"}]},
    }
    assert compute_digest(changed("model.router", router)) == compute_digest(changed("model.router", moved))


@pytest.mark.parametrize(
    "class_path",
    ["theirs.routers.TopKRouter", "lightning_moevlm_plus.TopKRouter", "lightning_moevlm.model.routers.TopPRouter"],
)
def test_another_class_is_another_experiment(class_path):
    ours = changed("model.router", {"class_path": "lightning_moevlm.model.routers.TopKRouter"})
    assert compute_digest(ours) != compute_digest(changed("model.router", {"class_path": class_path}))


def test_an_option_that_is_added_and_off_is_the_same_experiment():
    assert compute_digest(changed("model.new_option", None)) == compute_digest(CONFIG)
    assert compute_digest(changed("model.parts", [{"new": None}])) == compute_digest(changed("model.parts", [{}]))
    assert compute_digest(changed("model.parts", [None, 1])) != compute_digest(changed("model.parts", [1]))


def test_order_of_keys_is_no_identity():
    assert compute_digest(dict(reversed(CONFIG.items()))) == compute_digest(CONFIG)


def test_plan_is_arms_times_seeds(tmp_path):
    plan = plan_of(write_project(tmp_path, "sqlite:///x.db"))
    assert [run.name for run in plan.runs] == ["baseline-seed0", "baseline-seed1", "fast-seed0", "fast-seed1"]
    assert len({run.digest for run in plan.runs}) == 4
    run = plan.runs[3]
    assert flatten_values(run.overrides) == {
        "model.speed": 0.9,
        "seed_everything": 1,
        "trainer.max_steps": 4,
        "trainer.max_epochs": -1,
        "trainer.default_root_dir": str(tmp_path / "sweeps" / "tiny" / f"fast-seed1-{run.digest}"),
        "trainer.logger.init_args.experiment_name": "tiny",
        "trainer.logger.init_args.run_name": "fast-seed1",
        "trainer.logger.init_args.tags.sweep": "tiny",
        "trainer.logger.init_args.tags.arm": "fast",
        "trainer.logger.init_args.tags.seed": "1",
        "trainer.logger.init_args.tags.digest": run.digest,
    }
    # The overrides over the base are the very config that was digested.
    assert compute_digest(resolve(list(plan.study.base), run.overrides)) == run.digest


@pytest.mark.parametrize(
    ("noise", "num_resolved"),
    [
        (0.5, 2 + 1),  # each arm once, and one seed to verify the first arm
        ("${seed_everything}", 2 * (1 + 4)),  # a key that the study does not own: each arm once in vain, then each seed
        ("s${seed_everything}", 2 * (1 + 4)),
        (
            "${plus_one:${seed_everything}}",
            1 + 1 + 4 + 4,
        ),  # the verified seed shows it, for both arms
    ],
)
def test_an_arm_is_resolved_once_if_only_the_studys_keys_hold_the_seed(tmp_path, noise, num_resolved):
    OmegaConf.register_new_resolver("plus_one", lambda number: number + 1, replace=True)
    calls = []

    def counting(files: list[Path], overrides: dict) -> dict:
        calls.append(overrides)
        return resolve(files, overrides)

    study = read_study(write_project(tmp_path, "sqlite:///x.db", {"seeds": [3, 0, 11, 5]}, {"noise": noise}))
    plan = plan_study(study, counting, describe, tmp_path / "sweeps")
    assert len(calls) == num_resolved
    for run in plan.runs:  # whichever way: the digest of what the command line resolves
        own = resolve(list(study.base), run.overrides)
        assert own == run.resolved | {"trainer": own["trainer"]}
        assert own["model"]["seed"] == run.seed
        assert own["model"]["noise"] in (0.5, run.seed, run.seed + 1, f"s{run.seed}")
        assert compute_digest(own) == run.digest


def test_an_arm_that_holds_the_seed_elsewhere_is_verified_for_itself(tmp_path):
    OmegaConf.register_new_resolver("plus_one", lambda number: number + 1, replace=True)
    arms = {"baseline": None, "own": {"model.noise": "${plus_one:${seed_everything}}"}, "again": {"model.skew": 2.0}}
    calls = []

    def counting(files: list[Path], overrides: dict) -> dict:
        calls.append(overrides)
        return resolve(files, overrides)

    study = read_study(write_project(tmp_path, "sqlite:///x.db", {"seeds": [3, 0, 11], "arms": arms}))
    plan = plan_study(study, counting, describe, tmp_path / "sweeps")
    assert len(calls) == (1 + 1) + (1 + 1 + 3) + 3
    assert [run.resolved["model"]["noise"] for run in plan.runs if run.arm == "own"] == [4, 1, 12]


def test_a_seed_that_is_refused_names_its_arm(tmp_path):
    def small(files: list[Path], overrides: dict) -> dict:
        resolved = resolve(files, overrides)
        noise = resolved["model"].get("noise", 3)
        if noise != 3:
            raise UserError(f"noise {noise} is not 3")
        return resolved

    arms = {"baseline": None, "own": {"model.noise": "${seed_everything}"}}
    study = read_study(write_project(tmp_path, "sqlite:///x.db", {"seeds": [3, 11], "arms": arms}))
    with pytest.raises(UserError, match="arm 'own': noise 11 is not 3"):
        plan_study(study, small, describe, tmp_path / "sweeps")


def test_digests_do_not_depend_on_the_place(tmp_path):
    digests = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        digests.append([run.digest for run in plan_of(write_project(tmp_path / name, f"sqlite:///{name}.db")).runs])
    assert digests[0] == digests[1]


def test_changed_base_changes_every_run(tmp_path):
    before = plan_of(write_project(tmp_path, "sqlite:///x.db"))
    after = plan_of(write_project(tmp_path, "sqlite:///x.db", model={"skew": 0.2}))
    assert {run.digest for run in before.runs}.isdisjoint({run.digest for run in after.runs})


def test_changed_arm_changes_its_runs_only(tmp_path):
    before = plan_of(write_project(tmp_path, "sqlite:///x.db"))
    after = plan_of(
        write_project(tmp_path, "sqlite:///x.db", {"arms": {"baseline": None, "fast": {"model.speed": 1.0}}})
    )
    assert [a.digest == b.digest for a, b in zip(before.runs, after.runs, strict=True)] == [
        True,
        True,
        False,
        False,
    ]


def test_arm_that_changes_nothing_is_refused(tmp_path):
    file = write_project(tmp_path, "sqlite:///x.db", {"arms": {"baseline": None, "same": {"model.speed": 0.5}}})
    with pytest.raises(UserError, match=r"arms 'baseline' and 'same' are the same run .* sets nothing that differs"):
        plan_of(file)


def test_seeds_that_nothing_follows_are_refused(tmp_path):
    file = write_project(tmp_path, "sqlite:///x.db", model={"seed": 7})
    with pytest.raises(UserError) as refusal:
        plan_of(file)
    message = str(refusal.value)
    assert "\n" not in message
    assert "tiny.yaml: seeds 0 and 1 of arm 'baseline' differ in seed_everything alone" in message
    assert "`data.seed: ${seed_everything}` and `model.seed: ${seed_everything}`" in message


def test_refusal_of_the_parser_names_the_arm_and_nothing_is_written(tmp_path):
    def strict(files: list[Path], overrides: dict) -> dict:
        if "bogus" in overrides.get("model", {}):
            raise UserError("unknown option model.bogus")
        return resolve(files, overrides)

    file = write_project(tmp_path, "sqlite:///x.db", {"arms": {"baseline": None, "odd": {"model.bogus": 1}}})
    before = sorted(tmp_path.rglob("*"))
    line = 1 + file.read_text().splitlines().index("  odd:")
    with pytest.raises(UserError, match=rf"tiny\.yaml:{line}: arm 'odd': unknown option model\.bogus"):
        plan_study(read_study(file), strict, describe, tmp_path / "sweeps")
    assert sorted(tmp_path.rglob("*")) == before


def test_logger_keys_are_checked_before_the_start(tmp_path):
    seen = []

    def watching(files: list[Path], overrides: dict) -> dict:
        seen.append(overrides["trainer"]["logger"]["init_args"].keys())
        return resolve(files, overrides)

    plan_study(read_study(write_project(tmp_path, "sqlite:///x.db")), watching, describe, tmp_path)
    assert all(keys >= {"experiment_name", "run_name", "tags"} for keys in seen)


@pytest.mark.parametrize(
    ("seeds", "decide", "told"),
    [
        ([3], {}, "1 seed gives no interval and no verdict; at least 2 are needed: add to `seeds` in "),
        ([3, 4], {}, None),
        (
            [3, 4],
            {"test": "sign"},
            "2 seeds give no interval and no verdict; at least 6 are needed: add to `seeds` in ",
        ),
    ],
)
def test_the_plan_says_that_seeds_are_too_few_for_a_verdict(tmp_path, seeds, decide, told):
    file = write_project(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", {"seeds": seeds, "decide": decide})
    plan = plan_of(file)
    notes = plan_table(plan, dict.fromkeys((run.folder for run in plan.runs), "planned")).notes
    found = [note for note in notes if "no interval" in note]
    assert found == ([f"{told}{file}."] if told else [])
