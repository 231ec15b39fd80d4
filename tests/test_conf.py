"""Every shipped configuration parses, has the costs it claims, and trains a step."""

import fnmatch
import functools
import json
import re
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

import lightning_moevlm.model.routers as routers_module
from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from lightning_moevlm.contracts.model_card import ModelCard
from lightning_moevlm.model.layers import ModelStabilisers
from lightning_moevlm.model.routers import Router
from lightning_moevlm.study.plan.run_identity import compute_digest
from lightning_moevlm.training import Actions
from tests.conftest import PROJECT
from tests.model.losses.test_others import MostProbable
from tests.small_run import SMALL, budget

WHOLE = [
    path
    for path in (PROJECT / "conf").rglob("*.yaml")
    if "\nseed_everything" in path.read_text(encoding="utf-8")
    and path.parent.name != "hugging_face"  # needs the extra hf: tests/model/backbones/adopted
]
CONFIGS = sorted(path.relative_to(PROJECT).as_posix() for path in WHOLE)
VARIANTS = sorted(  # of the models in their folder
    path.relative_to(PROJECT).as_posix()
    for folder in {path.parent for path in WHOLE} - {PROJECT / "conf"}
    for path in set(folder.glob("*.yaml")) - set(WHOLE)
)
OVERLAYS = sorted(
    path.relative_to(PROJECT).as_posix()
    for path in (PROJECT / "conf/overlays").glob("*.yaml")
    if path.name != "scenes_20k.yaml"  # tests/study/plan/test_golden_plan.py plans studies with it
)
ROUTERS = sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "conf/routers").glob("*.yaml"))
DATA = sorted(  # of folders; tests/data/storage/test_object_store.py trains from a bucket
    path.relative_to(PROJECT).as_posix()
    for path in (PROJECT / "conf/data").glob("*.yaml")
    if "root: data/shards/" in path.read_text(encoding="utf-8")
)
CALLBACKS = sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "conf/callbacks").glob("*.yaml"))
ILLNESSES = sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "conf/illnesses").glob("*.yaml"))
LIKE_BASE = ("conf/vl_moe/large.yaml", "conf/limoe/small.yaml", "conf/moma/small.yaml")
BACKBONE = "--model.backbone.init_args"
Resolve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def resolver() -> ConfigResolver:
    return ConfigResolver()


@pytest.fixture(scope="module")
def resolve(resolver: ConfigResolver) -> Resolve:
    """Resolves each list of files once; what comes out is read only."""
    return functools.cache(lambda *files: resolver([PROJECT / file for file in files], {}))


@pytest.fixture(scope="module")
def describe(resolve: Resolve) -> Callable[..., ModelCard]:
    """Counts the model of each list of files once."""
    return functools.cache(lambda *files: describe_model(resolve(*files)))


@pytest.mark.parametrize(
    "config",
    # a large or small model differs in values alone from its family's base, which runs
    [pytest.param(each, marks=pytest.mark.slow) if each in LIKE_BASE else each for each in CONFIGS],
)
def test_fast_dev_run(config: str, moevlm: Callable[..., str], scenes_root: Path) -> None:
    # widths and lengths that a laptop can hold; everything else is as shipped
    tower = [f"{BACKBONE}.vision={{dim: 16, num_heads: 2, num_blocks: 2, hidden_dim: 32}}"] * ("decoder" in config)
    root = [] if config == "conf/healthy_experts.yaml" else [f"--data.root={scenes_root}"]  # that one names sources
    moevlm(
        "fit", "-c", config, *tower, "--trainer.fast_dev_run=true", "--trainer.precision=32-true",
        *root, "--data.batch_size=4", "--data.image_size=32", "--data.max_text_len=24",
        "--data.vocab_size=640", "--data.num_workers=0", f"{BACKBONE}.dim=16", f"{BACKBONE}.num_heads=2",
        f"{BACKBONE}.hidden_dim=32", f"{BACKBONE}.patch_size=8",
        f"{BACKBONE}.moe.init_args.experts.init_args.hidden_dim=32",
    )  # fmt: skip


@pytest.mark.parametrize("config", ROUTERS)
def test_every_router_trains_a_step(config: str, moevlm: Callable[..., str], scenes_root: Path) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    assert f"moevlm fit -c conf/quickstart.yaml -c {config}" in text
    moevlm(
        "fit", "-c", "conf/quickstart.yaml", "-c", config, "--trainer.fast_dev_run=true", f"--data.root={scenes_root}",
        "--data.batch_size=4", f"{BACKBONE}.dim=16", f"{BACKBONE}.num_heads=2", f"{BACKBONE}.hidden_dim=32",
    )  # fmt: skip


@pytest.mark.parametrize("config", CALLBACKS)
def test_a_callback_is_added_and_takes_nothing_away(config: str, resolver: ConfigResolver) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    (base,) = re.findall(rf"moevlm fit -c (conf/[\w/]+\.yaml) -c {config}", text)
    plain, added = ([PROJECT / base], [PROJECT / base, PROJECT / config])
    before, after = (
        [callback["class_path"] for callback in resolver(files, {})["trainer"]["callbacks"]] for files in (plain, added)
    )
    packages = ("lightning_moevlm.training.callbacks.", "lightning_moevlm.atlas.live.", "lightning.pytorch.callbacks.")
    assert after[:-1] == before and after[-1].startswith(packages)


@pytest.mark.slow
def test_the_precision_shadow_runs_with_the_quickstart(moevlm: Callable[..., str]) -> None:
    moevlm("fit", *SMALL, "-c", "conf/callbacks/precision_shadow.yaml", *budget(2), "--trainer.precision=bf16-mixed")


def test_micro_batches_are_the_same_step(resolver: ConfigResolver) -> None:
    whole, overlay = (PROJECT / f"conf/{name}.yaml" for name in ("quickstart", "overlays/micro_batches"))
    one, many = resolver([whole], {}), resolver([whole, overlay], {})
    assert many["data"]["batch_size"] * many["trainer"]["accumulate_grad_batches"] == one["data"]["batch_size"]
    steps_between = many["trainer"]["val_check_interval"] / many["trainer"]["accumulate_grad_batches"]
    assert steps_between == one["trainer"]["val_check_interval"]


@pytest.mark.filterwarnings("ignore:.*this saves time on CUDA devices only:UserWarning")  # conf/overlays/gpu_data.yaml
@pytest.mark.parametrize("config", OVERLAYS)
def test_every_overlay_trains_a_step_over_the_file_that_it_names(
    config: str, moevlm: Callable[..., str], scenes_root: Path
) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    base, named = re.findall(r"moevlm fit -c (\S+) -c (\S+)", text)[0]
    assert named == config
    moevlm(
        "fit", "-c", base, "-c", config, "--trainer.fast_dev_run=true", f"--data.root={scenes_root}",
        "--data.batch_size=4", "--data.image_size=32", f"{BACKBONE}.dim=16", f"{BACKBONE}.num_heads=2",
        f"{BACKBONE}.hidden_dim=32",
    )  # fmt: skip


@pytest.mark.parametrize("config", DATA)
def test_every_data_configuration_trains_a_step_over_the_file_that_it_names(
    config: str, moevlm: Callable[..., str], scenes_root: Path
) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    assert f"moevlm fit -c conf/quickstart.yaml -c {config}" in text
    for root in re.findall(r"root: (data/shards/\S+)", text):
        if not Path(root).exists():  # the demo sets are alike to a reader
            Path(root).symlink_to(scenes_root, target_is_directory=True)
    moevlm("fit", *SMALL, "-c", config, "--trainer.fast_dev_run=true")


@pytest.mark.parametrize("config", ILLNESSES)
def test_every_illness_changes_the_healthy_model_and_has_a_study_and_a_row(config: str, resolve: Resolve) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    base = find_base(config)
    assert "Sign: " in text and "Mild: " in text
    assert resolve(base, config) != resolve(base)
    studies = [study.read_text(encoding="utf-8") for study in (PROJECT / "ablations/cures").glob("*.yaml")]
    assert [f"base: [{base}]" in study for study in studies if f"illness: [{config}]" in study] == [True]
    guide = (PROJECT / "conf/illnesses/README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{Path(config).name}` \| .*$", guide, flags=re.MULTILINE)
    sign = row.split(" | ")[4]
    (study,) = (yaml.safe_load(each) for each in studies if f"illness: [{config}]" in each)
    logged = study["design"]["cures"]["signs"]
    for metric in re.findall(r"`([^`]+)`", sign):  # one sign in overlay, guide and study
        assert metric in text
        assert sign.startswith("none") or fnmatch.filter(logged, f"{metric}*")


@pytest.mark.slow  # each is a run; the golden plans build them all
@pytest.mark.parametrize("config", ILLNESSES)
def test_every_illness_trains_a_step(config: str, moevlm: Callable[..., str]) -> None:
    moevlm("fit", "-c", find_base(config), "-c", config, "--trainer.fast_dev_run=true")


def find_base(config: str) -> str:
    """Return the healthy model that the illness names in its command."""
    text = (PROJECT / config).read_text(encoding="utf-8")
    (base,) = re.findall(rf"moevlm fit -c (conf/healthy\w*\.yaml) -c {config}", text)
    return str(base)


def test_an_arm_changes_one_source_and_leaves_the_others(resolver: ConfigResolver) -> None:
    files = [PROJECT / "conf/quickstart.yaml", PROJECT / "conf/data/mixture.yaml"]
    before = resolver(files, {})["data"]["sources"]
    after = resolver(files, {"data": {"sources": {"scenes": {"weight": 0.5}}}})["data"]["sources"]
    assert after == {**before, "scenes": {**before["scenes"], "weight": 0.5}} != before
    without = resolver(files, {"data": {"sources": {"openmoji": None}}})["data"]["sources"]
    assert without == {**before, "openmoji": None}


def test_an_arm_changes_one_loss_from_elsewhere_and_leaves_the_others(resolver: ConfigResolver, tmp_path: Path) -> None:
    files = [PROJECT / "conf/quickstart.yaml"]
    spell = f"{MostProbable.__module__}.{MostProbable.__qualname__}"
    for name, loss in {
        "a": spell,
        "b": {"class_path": spell, "init_args": {"weight": {"start": 0.0, "stop": 1.0, "num_steps": 9}}},
    }.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps({"model": {"losses": {"others": {name: loss}}}}), encoding="utf-8")

    def others(overrides: object) -> Any:
        return resolver(files, {"model": {"losses": {"others": overrides}}})["model"]["losses"]["others"]

    before = others({})
    assert list(before) == ["a", "b"] and before["a"]["init_args"] == {"weight": 0.5}
    assert others({"a": None}) == {**before, "a": None}
    # options go over those before, also over a class named alone; a weight of another kind takes the whole place
    for weight in (
        0.25,
        {"class_path": "lightning_moevlm.model.losses.BySparsity", "init_args": {"start": 1e-8, "factor": 1.2}},
    ):
        changed = {"class_path": spell, "init_args": {"weight": weight}}
        assert others({"a": {"init_args": {"weight": weight}}}) == {**before, "a": changed}
        assert others({"b": {"init_args": {"weight": weight}}}) == {**before, "b": changed}
    assert others(None) is None


def test_describing_a_model_leaves_its_configuration_as_it_was(resolver: ConfigResolver) -> None:
    # reports compare the digests of configurations after their models were described
    spell = f"{MostProbable.__module__}.{MostProbable.__qualname__}"
    resolved = resolver(
        [PROJECT / "conf/quickstart.yaml"], {"model": {"losses": {"others": {"sure": {"class_path": spell}}}}}
    )
    before = compute_digest(resolved)
    describe_model(resolved)
    assert compute_digest(resolved) == before


def test_every_router_has_a_configuration_and_an_arm() -> None:
    routers = {part.__name__ for part in vars(routers_module).values() if is_router(part)}
    for place in (ROUTERS, ["ablations/routers.yaml"]):
        text = "".join((PROJECT / path).read_text(encoding="utf-8") for path in place)
        named = set(re.findall(r"class_path: (\w+Router)\b", text))
        assert named | {"TopKRouter"} == routers  # top-k is the baseline, named in conf/quickstart.yaml


def is_router(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Router) and part is not Router


def test_every_switch_and_action_has_an_arm() -> None:
    arms = yaml.safe_load((PROJECT / "ablations/stabilisers.yaml").read_text(encoding="utf-8"))["arms"].values()
    for prefix, record in (("model.backbone.init_args.stabilisers", ModelStabilisers), ("model.actions", Actions)):
        set_here = {key.removeprefix(f"{prefix}.") for arm in arms for key in arm if key.startswith(f"{prefix}.")}
        set_together = {name for arm in arms for name in arm.get(prefix, {})}
        assert set_here | set_together == {entry.name for entry in fields(record)}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_costs_what_the_guide_says(config: str, describe: Callable[..., ModelCard]) -> None:
    card = describe(config)
    assert 0 < card.active_parameters < card.total_parameters
    costs = (spell(card.total_parameters), spell(card.active_parameters), f"{card.active_flops_per_sample / 1e9:.3g}")
    rows = (PROJECT / "conf/README.md").read_text(encoding="utf-8").splitlines()
    name = f"| `{config.removeprefix('conf/')}` | "
    assert [row for row in rows if row.startswith(name) and row.endswith(f" | {' | '.join(costs)} |")]


def spell(number: int) -> str:
    """Three digits, in millions or billions."""
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


@pytest.mark.parametrize("config", VARIANTS)
def test_a_variant_of_a_family_costs_what_its_model_costs(config: str, describe: Callable[..., ModelCard]) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    base, named = re.findall(r"moevlm fit -c (\S+) -c (\S+)", text)[0]
    assert named == config
    model, variant = describe(base), describe(base, config)
    assert variant.active_flops_per_sample == pytest.approx(model.active_flops_per_sample, rel=0.01)
    is_dense = variant.active_parameters == variant.total_parameters
    assert is_dense is (Path(config).stem in ("dense", "1t1i"))


@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_is_dropless_as_shipped(config: str, resolve: Resolve) -> None:
    capacity = resolve(config)["model"]["backbone"]["init_args"]["moe"]["init_args"]["capacity"]
    # experts choose; two experts per token in a causal model; illnesses alone drop tokens
    if config.startswith(("conf/moma", "conf/decoder", "conf/healthy")):
        assert capacity is None
    else:
        assert capacity["train_factor"] == 1.25 and capacity["eval_factor"] is None


@pytest.mark.parametrize(
    ("config", "published", "rest"),
    [
        ("conf/vl_moe/base.yaml", 1.95e9, 0),  # about 2.0 B; a blog of its authors prints 1.9 B
        # V-MoE-B/16 "Every 2" has 979.0 M (arXiv 2106.05974): this tower with 18,291 classes in place of words
        ("conf/limoe/base.yaml", 979.0e6, (18_291 - 32_000) * 768),
        ("conf/moma/base.yaml", 1.9e9, 65_536 * 1024),  # arXiv 2407.21770, table 1, with an output matrix
    ],
)
def test_base_is_the_published_model(
    config: str, published: float, rest: int, describe: Callable[..., ModelCard]
) -> None:
    assert describe(config).total_parameters + rest == pytest.approx(published, rel=0.03)


def test_later_files_and_flags_move_what_refers_to_them(resolver: ConfigResolver) -> None:
    resolved = resolver([PROJECT / "conf/quickstart.yaml"], {"data": {"image_size": 32}, "seed_everything": 7})
    assert resolved["model"]["backbone"]["init_args"]["image_size"] == 32
    assert resolved["model"]["seed"] == resolved["data"]["seed"] == 7


def test_one_batch_is_not_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """typing hands out whichever of Union[float, int] and Union[int, float] the process wrote first."""
    keys = ("limit_val_batches", "limit_train_batches", "val_check_interval", "gradient_clip_val")
    for key in keys:
        monkeypatch.setitem(Trainer.__init__.__annotations__, key, float | int | None)
    for forget in typing._cleanups:
        forget()
    assert typing.Optional[float | int | None].__args__ == (float, int, type(None))  # noqa: UP045  # and this one, too
    resolve = ConfigResolver()
    for given in (1, 1.0, None):
        trainer = resolve([Path("conf/quickstart.yaml")], {"trainer": dict.fromkeys(keys, given)})["trainer"]
        assert {key: repr(trainer[key]) for key in keys} == dict.fromkeys(keys, repr(given))


def test_an_arm_turns_one_loss_off_and_leaves_the_other(resolver: ConfigResolver) -> None:
    resolved = resolver([PROJECT / "conf/quickstart.yaml"], {"model": {"losses": {"load_balance": None}}})
    on = {name: loss for name, loss in resolved["model"]["losses"].items() if loss is not None}
    assert on == {"router_z": {"weight": 0.001}}


def test_an_arm_sets_one_switch_and_one_action_and_leaves_the_others(resolver: ConfigResolver) -> None:
    stabilisers = {"backbone": {"init_args": {"stabilisers": {"sub_norm": True}}}}
    resolved = resolver([PROJECT / "conf/quickstart.yaml"], {"model": {**stabilisers, "actions": {"rollback": {}}}})
    switches = resolved["model"]["backbone"]["init_args"]["stabilisers"]
    assert switches == vars(ModelStabilisers()) | {"sub_norm": True}
    assert {name for name, action in resolved["model"]["actions"].items() if action is not None} == {"rollback"}


@pytest.mark.parametrize("config", CONFIGS)
def test_files_are_short_and_say_how_to_run_them(config: str) -> None:
    text = (PROJECT / config).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert "moevlm fit -c" in text.split("\nseed_everything")[0]
    assert isinstance(yaml.safe_load(text), dict)
