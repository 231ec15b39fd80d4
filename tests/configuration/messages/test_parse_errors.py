"""The parser's nested complaints, and the one line that is made of them: real parsers, real mistakes."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from lightning_moevlm.cli.run_command import run_command
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.messages.parse_errors import short_message
from lightning_moevlm.configuration.parsers import user_errors
from lightning_moevlm.configuration.resolver import ConfigResolver
from tests.conftest import PROJECT

WEIGHT = "model.losses.load_balance.weight"
RAMP = "a Ramp {start, stop, num_steps, begin, shape}"
CAPACITY = "model.backbone.init_args.moe.init_args.capacity.train_factor"
ROUTER = "model.backbone.init_args.moe.init_args.router"


@pytest.fixture(scope="module")
def resolver() -> ConfigResolver:
    return ConfigResolver()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (
            WEIGHT,
            {"strat": 0, "num_steps": 10},
            f"{WEIGHT}: neither Ramp nor ByOverflow takes 'strat'; did you mean start? give a number, {RAMP} or a "
            "ByOverflow {drop_rate, start, factor}",
        ),
        (WEIGHT, "abc", f"{WEIGHT}: abc is not a valid value; give a number, {RAMP} or a ByOverflow"),
        (WEIGHT, {"start": 0, "num_steps": 10}, f"{WEIGHT}: Ramp needs stop too"),
        (
            ROUTER,
            {"class_path": "tests.conftest.NoRouter"},
            "model.backbone.moe.router: module tests.conftest has no class NoRouter",
        ),
        (
            ROUTER,
            {"class_path": "lightning_moevlm.model.routers.TopKRoute"},
            "router: module lightning_moevlm.model.routers has no class TopKRoute; did you mean TopKRouter?",
        ),
        (CAPACITY, {"start": 2.0}, "capacity.train_factor: Ramp needs stop, num_steps too"),
        (
            WEIGHT,
            {"start": 0, "stop": 1, "num_steps": 10, "shape": "lineer"},
            f"{WEIGHT}.shape: lineer is not a valid value; did you mean linear? give linear, cosine or sqrt",
        ),
        (
            "model.losses.load_balance",
            0.1,
            "model.losses.load_balance: 0.1 is not a valid value; give a LoadBalance {weight, scope, per_modality, "
            "only} or null",
        ),
        (
            "model.gradient",
            None,
            "model.gradient is null, which is not allowed: it is a group of options; set those "
            "(model.gradient.clip_norm, model.gradient.clip_value, ...); null turns off clip_norm, clip_value, z_clip, "
            "ada_gc, clip_update, skip_spikes",
        ),
        (
            "model.init_std",
            None,
            "model.init_std is null, which is not allowed: give a number, or leave",
        ),
        (
            f"{ROUTER}.class_path",
            "Router",
            f"{ROUTER}: Router is abstract; `moevlm list` shows the choices",
        ),
        (f"{ROUTER}.class_path", "torch.nn.Linear", "torch.nn.Linear is not a Router; `moevlm list` shows the cho"),
        (
            "model.losses.load_balance.wieght",
            0.1,
            "model.losses.load_balance: LoadBalance takes no 'wieght'; did you mean weight? it takes weight, scope, "
            "per_modality or only",
        ),
        (
            "model.precision.router",
            "bfloat",
            "model.precision.router: bfloat is not a valid value; did you mean bfloat16?",
        ),
        (
            "model.gradient.clip_norm",
            "abc",
            "model.gradient.clip_norm: abc is not a valid value; give a number or null",
        ),
        ("data.batch_size", "many", "data.batch_size: many is not a valid value; give a whole number"),
        (
            "model.backbone.class_path",
            "VLMOE",
            "model.backbone: there is no class VLMOE; did you mean VLMoE? choose Hug",
        ),
        (
            "model.optimizer.class_path",
            "MuonAdam",
            "there is no class MuonAdam; did you mean MuonAdamW? choose Hyperball, ",
        ),
        ("model.optimizer.class_path", "Adam_W", "there is no class Adam_W; did you mean AdamW? choose Hyperball, "),
        (
            "model.schedule.class_path",
            "Cosine",
            "there is no class Cosine; did you mean WarmupCosine? choose RateJump, Warmup",
        ),
        (f"{ROUTER}.class_path", "TopK", "model.backbone.moe.router: there is no class TopK; did you mean TopKRouter?"),
        (
            f"{ROUTER}.init_args.topk",
            2,
            "model.backbone.moe.router: TopKRouter takes no 'topk'; did you mean top_k? it takes dim, num_experts, ",
        ),
        (f"{ROUTER}.init_args.gate.jiter", 1, "moe.router.gate: Gate takes no 'jiter'; did you mean jitter? it takes"),
        (
            "model.backbone.init_args.stabilisers.qknorm",
            False,
            "model.backbone.stabilisers: ModelStabilisers takes no 'qknorm'; did you mean qk_norm? `moevlm describe "
            "ModelStabilisers` lists its options",
        ),
        (
            "trainer.max_step",
            3,
            "there is no key trainer.max_step; did you mean trainer.max_steps? `moevlm fit --help` lists the keys",
        ),
        ("model.losses.load_balnce.weight", 1, "did you mean model.losses.load_balance?"),
        ("modle.seed", 1, "did you mean model?"),
        (
            "model.router_z",
            1,
            "there is no key model.router_z; did you mean model.losses.router_z? `moevlm fit --help` lists the keys",
        ),
        (
            "model.backbone.router",
            "TopPRouter",
            "model.backbone: VLMoE takes no 'router'; did you mean moe.init_args.router? `moevlm describe VLMoE`",
        ),
        (
            f"{ROUTER}.init_args.top_k",
            "high",
            "model.backbone.moe.router.top_k: high is not a valid value; give a whole number",
        ),
        (
            "model.losses.others",
            {"sure": {"class_path": "tests.model.losses.test_others.MostProbable", "init_args": {"weight": "high"}}},
            f"model.losses.others.weight: high is not a valid value; give a number, {RAMP} or an AdaptiveWeight",
        ),
        (
            "model.losses.others",
            {"sure": "Trustful"},
            "there is no class Trustful; choose MostProbable, or give the full path of your own, my_package.Trustful",
        ),
        (
            "model.backbone",
            {"moe": {"router": "TopPRouter"}, "init_args": {"num_blocks": 3}},
            "model.backbone: options are given with and without init_args; write model.backbone.init_args.moe in place "
            "of model.backbone.moe",
        ),
    ],
)
def test_mistakes_in_a_file_are_explained_at_their_place(
    key: str, value: object, told: str, resolver: ConfigResolver
) -> None:
    overrides: object = value
    for part in reversed(key.split(".")):
        overrides = {part: overrides}
    assert isinstance(overrides, dict)
    with pytest.raises(UserError) as caught:
        resolver([PROJECT / "conf/quickstart.yaml"], overrides)
    assert told in str(caught.value)
    assert "Union" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        (WEIGHT, "{strat: 0, num_steps: 10}", "neither Ramp nor ByOverflow takes 'strat'; did you mean start?"),
        (f"{WEIGHT}.strat", "1", "neither Ramp nor ByOverflow takes 'strat'"),
        (ROUTER, "TopK", "there is no class TopK; did you mean TopKRouter?"),
        (f"{ROUTER}.gate.jiter", "1", "moe.router.gate: Gate takes no 'jiter'; did you mean jitter?"),
        ("model.backbone.init_args.stabilisers.qknorm", "false", "takes no 'qknorm'; did you mean qk_norm?"),
        ("trainer.max_step", "3", "there is no key trainer.max_step; did you mean trainer.max_steps?"),
        ("model.losses.load_balnce.weight", "1", "did you mean model.losses.load_balance?"),
        ("trainer.callbacks", "[{class_path: Telemetri}]", "there is no class Telemetri; did you mean Telemetry?"),
        (
            "router",
            "TopKRouter",
            "there is no key router; did you mean model.precision.router or model.backbone.init_args.router or "
            f"{ROUTER}?",
        ),
        ("no_such_key", "1", "there is no key no_such_key; `moevlm fit --help` lists"),
        ("model.router_z", "null", "there is no key model.router_z; did you mean model.losses.router_z?"),
        ("model.los.router_z", "null", "did you mean model.losses?"),
        (
            "model.losses.importance",
            "0.01",
            "model.losses.importance: 0.01 is not a valid value; give an Importance {weight, per_modality} or null",
        ),
        (
            "model.losses.router_z",
            "{class_path: lightning_moevlm.model.losses.OutputZ}",
            "lightning_moevlm.model.losses.OutputZ is not allowed here; RouterZ is set by its options, not by another "
            "class: `moevlm describe RouterZ` lists them",
        ),
    ],
)
def test_mistakes_in_options_are_explained_at_their_place(
    option: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_moevlm.cli import training

    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["moevlm"])  # `run` puts its words there
    with pytest.raises(UserError) as caught:
        training.run(["fit", "-c", "conf/quickstart.yaml", f"--{option}", value])
    assert told in str(caught.value)
    assert "Union" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep"], "moevlm sweep needs a command; choose new, plan, run, status, report"),
        (
            ["data", "convert"],
            "moevlm data convert needs a command; choose csv, jsonl, img2dataset, coco_captions, karpathy, ",
        ),
        (
            ["list", "routres"],
            "kind: routres is not a valid value; did you mean routers? give backbones, layers, routers",
        ),
        (["list", "foo"], "kind: foo is not a valid value; give backbones, layers, routers, "),
        (["sweep", "run", "x.yaml", "--job", "2"], "there is no option --job; did you mean --jobs?"),
        (
            ["describe", "-c", "x.yaml", "--model.seed", "2"],
            "no option --model.seed here: write it into a file, and give",
        ),
        (["bench", "layer", "--round", "1"], "did you mean --rounds?"),
        (["data", "build", "scenes", "--num-sample", "3"], "did you mean --num_samples?"),
        (["data", "build", "scenes", "--image-format", "gif"], "gif is not a valid value; give jpg or png"),
        (["sweep", "run", "x.yaml", "--jobs", "2x"], "jobs: 2x is not a valid value; give a whole number or null"),
        (["describe", "model.losses.router_z"], "is a key, not a class; `moevlm describe RouterZ` describes it"),
        (["describe", "model.seed"], "model.seed is a key, not a class; `moevlm fit --help` describes keys"),
        (["sweep", "rum"], "there is no command rum; did you mean run? choose new, plan, run, status, report"),
    ],
)
def test_mistakes_in_commands_name_the_allowed_values(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run_command(words)
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_overlay_alone_asks_for_the_configuration_below_it(resolver: ConfigResolver) -> None:
    with pytest.raises(
        UserError,
        match=r"model.backbone: options without a class; give the class_path of HuggingFaceModel, LIMoE, MoEDecoder, "
        r"MoMa or VLMoE",
    ):
        resolver([PROJECT / "conf/routers/relu.yaml"], {})


def test_texts_of_other_forms_pass_as_one_line() -> None:
    assert short_message("Subcommand 'fit' does not\n accept it") == "Subcommand 'fit' does not accept it"


def test_help_on_a_part_of_no_configuration_asks_for_one() -> None:
    told = short_message("argument --model.backbone: expected one argument")
    assert told.startswith("--model.backbone needs a value; ") and told.endswith(
        "give the configuration first: -c FILE --model.backbone.help"
    )


def test_a_class_that_is_not_imported_is_explained_by_the_text_alone() -> None:
    message = "Parser key \"a\": Problem with given class_path 'nowhere.Part': Option 'size' is not accepted"
    assert short_message(message) == "a: Option 'size' is not accepted"


def test_a_configuration_that_is_not_yaml_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_moevlm.cli import training

    (tmp_path / "broken.yaml").write_text("model: [1\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["moevlm"])
    with pytest.raises(UserError, match=r"is not valid YAML: line 2, column 1: .*; check brackets") as caught:
        training.run(["fit", "-c", str(tmp_path / "broken.yaml")])
    assert "unicode string" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"trainer.accelerator: no GPU is found; give cpu or auto"), user_errors():
        Trainer(accelerator="gpu", logger=False)
