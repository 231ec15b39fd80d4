"""A mistake is one line on standard error and exit code 2; nothing is half-written."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_moevlm import __version__
from tests.small_run import BACKBONE, SMALL, budget

Moevlm = Callable[..., str]
ENDLESS_CYCLE = ("--model.schedule.init_args.max_lr=0.1", "--model.schedule.init_args.total_steps=0")

MISTAKES = {
    "unknown command": (("frobnicate",), "frobnicate"),
    "unknown option": (("fit", *SMALL, "--model.loses.router_z=null"), "loses"),
    "unknown class": (("fit", *SMALL, f"{BACKBONE}.moe.init_args.router.class_path=NoRouter"), "NoRouter"),
    "a class of another kind": (
        ("fit", *SMALL, f"{BACKBONE}.moe.init_args.router.class_path=subprocess.Popen"),
        "subprocess.Popen",
    ),
    "wrong type": (("fit", *SMALL, f"{BACKBONE}.dim=wide"), "wide"),
    "top_k beyond the experts": (
        ("fit", *SMALL, f"{BACKBONE}.moe.init_args.router.init_args.top_k=5"),
        "router.top_k is 5: choose a number between 1 and 4, the num_experts",
    ),
    "unresolvable reference": (("fit", *SMALL, "--data.image_size=${nowhere.at_all}"), "nowhere"),
    "no such config": (
        ("fit", "-c", "conf/routers/topk.yaml"),
        "there is no configuration file conf/routers/topk.yaml; did you mean conf/routers/top_k.yaml? the shipped ones",
    ),
    "no such set": (("fit", *SMALL, "--data.root=data/shards/none"), "moevlm data build scenes"),
    "an optimiser for matrices alone": (("fit", *SMALL, *budget(1), "--model.optimizer=Muon"), "MuonAdamW"),
    "a rate below zero": (("fit", *SMALL, *budget(1), "--model.optimizer.init_args.lr=-1"), "Invalid learning rate"),
    # the parser lets these nulls pass, and failed inside itself where it builds the group
    "a group that is null": (("fit", *SMALL, "--model.gradient=null"), "set those (model.gradient.clip_norm,"),
    "a part that is null": (
        ("fit", *SMALL, f"{BACKBONE}.moe.init_args.router=null"),
        "moe.init_args.router is null, which is not allowed: give a Router",
    ),
    "a rate without end": (("fit", *SMALL, "--model.optimizer.init_args.lr=.inf"), "cannot train with lr inf"),
    "a schedule that torch refuses": (
        ("fit", *SMALL, "--model.schedule=OneCycleLR", *ENDLESS_CYCLE),
        "model.schedule cannot be built",
    ),
    "a schedule that divides by 0": (
        ("fit", *SMALL, "--model.schedule=StepLR", "--model.schedule.init_args.step_size=0"),
        "model.schedule StepLR fails after step 1",
    ),
    "an optimiser that is null": (
        ("fit", *SMALL, "--model.optimizer=null"),
        "model.optimizer is null, which is not allowed: give an Optimizer, or leave the option out",
    ),
    "one beta": (
        ("fit", *SMALL, "--model.optimizer.init_args.betas=[0.9]"),
        "error: model.optimizer.betas: Expected a tuple with 2 elements. Got value: [0.9]",
    ),
    "a modality named twice": (
        ("fit", *SMALL, f"{BACKBONE}.sparse_modalities=[image, image]"),
        "sparse_modalities is ['image', 'image']: name each modality once",
    ),
    "no blocks": (("fit", *SMALL, f"{BACKBONE}.num_blocks=0"), "error: num_blocks is 0: choose 1 or more"),
    "a callback's option that is null": (
        ("fit", *SMALL, "--trainer.callbacks=[{class_path: Liveness, init_args: {num_samples: null}}]"),
        "trainer.callbacks.Liveness.init_args.num_samples is null, which is not allowed: give a whole number",
    ),
    "a callback that is null": (
        ("fit", *SMALL, "--trainer.callbacks=[null]"),
        "trainer.callbacks: None is not a valid value; give a Callback or null",
    ),
    "a folder without a name": (
        ("predict", *SMALL, "--trainer.callbacks=[{class_path: FeatureWriter, init_args: {folder: ''}}]"),
        "folder of FeatureWriter is '': name one",
    ),
    "no such checkpoint": (("validate", *SMALL, "--ckpt_path=none.ckpt"), "none.ckpt"),
    "no such study": (
        ("sweep", "plan", "rooter_z.yaml"),
        "there is no study file rooter_z.yaml; did you mean ablations/router_z.yaml? the shipped ones are in ",
    ),
    "a loss that the router lacks": (
        ("fit", *SMALL, *budget(1), "--model.losses.load.weight=0.01"),
        "losses.load needs the noise of the router, and TopKRouter adds none",
    ),
    "a weight below zero": (
        ("fit", *SMALL, *budget(1), "--model.losses.router_z.weight=-1"),
        "losses.router_z.weight is -1.0: choose 0 or more",
    ),
    "a value that a nullable part refuses": (
        ("fit", *SMALL, *budget(1), "--data.augment.flip=2"),
        "data.augment.flip is 2.0: choose a value from 0 up to 1",
    ),
    "a value that a part of a dictionary refuses": (
        (
            "fit",
            *SMALL,
            *budget(1),
            "-c",
            "conf/data/mixture.yaml",
            "--data.sources.openmoji.pause.begin=-1",
            "--data.sources.openmoji.pause.num_steps=1",
        ),
        "begin of a pause is -1",
    ),
    "a word that is missing": (
        ("sweep", "plan"),
        "moevlm sweep plan needs FILE; `moevlm sweep plan --help` explains it",
    ),
    "no part and no configuration": (("describe",), "takes either a NAME or configurations, -c FILE; see --help"),
    "no such configuration": (("describe", "-c", "conf/quickstar.yaml"), "did you mean conf/quickstart.yaml?"),
    "no such part": (("describe", "TopKRooter"), "did you mean TopKRouter?"),
    "a part of a module that is not found": (
        ("describe", "my_package.MyRouter"),
        "there is no module my_package; if it is a module of your own, set PYTHONPATH, as in `PYTHONPATH=. moevlm ...`",
    ),
    "a router of a module that is not found": (
        ("fit", *SMALL, f"{BACKBONE}.moe.init_args.router=my_package.MyRouter"),
        "moe.router: there is no module my_package; if it is a module of your own, set PYTHONPATH",
    ),
    "a callback of a module that is not found": (
        ("fit", *SMALL, "--trainer.callbacks+=my_package.MyCallback"),
        "trainer.callbacks: there is no module my_package; if it is a module of your own, set PYTHONPATH",
    ),
    "a class that its module lacks": (
        ("describe", "lightning_moevlm.model.routers.MyRouter"),
        "lightning_moevlm.model.routers has no class MyRouter",
    ),
    "a seed that is no number": (
        ("fit", *SMALL, "--seed_everything=true"),
        "error: seed_everything: True is not a valid value; give a whole number",
    ),
    "no such kind": (("list", "rooters"), "rooters"),
    "tracking server that does not answer": (
        ("fit", *SMALL, *budget(1), "--trainer.logger.init_args.tracking_uri=http://127.0.0.1:9"),
        "http://127.0.0.1:9",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_code_2(mistake: str, moevlm: Moevlm, workplace: Path) -> None:
    arguments, expected = MISTAKES[mistake]
    before = sorted(workplace.rglob("*"))
    lines = [line for line in moevlm(*arguments, code=2).splitlines() if line.startswith("moevlm: error:")]
    assert len(lines) == 1 and expected in lines[0]
    assert sorted(workplace.rglob("*")) == before


def damage_truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-600])


def damage_flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["train-000001.tar", "val-000000.tar", "tokenizer.json", "manifest.json"])
def test_a_damaged_set_is_refused_before_anything_is_written(
    name: str, damage: Callable[[Path], None], moevlm: Moevlm, workplace: Path, scenes_root: Path
) -> None:
    link = workplace / "data/shards/scenes"
    link.unlink()
    shutil.copytree(scenes_root, link)
    if name == "manifest.json" and damage is not Path.unlink:
        (link / name).write_text((link / name).read_text().replace('"sha256": "', '"sha256": "0', 1))
    else:
        damage(link / name)
    before = sorted(workplace.rglob("*"))
    lines = moevlm("fit", *SMALL, *budget(1), code=2).splitlines()
    told = [line for line in lines if line.startswith("moevlm: error:")]
    assert len(told) == 1 and ("data/shards/scenes" in told[0] or name in told[0])
    assert sorted(workplace.rglob("*")) == before


def test_unknown_option_names_the_nearest(moevlm: Moevlm) -> None:
    assert "load_balance" in moevlm("fit", *SMALL, "--model.losses.load_balanc=null", code=2)


@pytest.mark.slow  # `test_mistakes_are_one_line_and_code_2` calls the same function in this process
def test_no_traceback_from_the_real_process(workplace: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_moevlm",
        "fit",
        "-c",
        "conf/quickstart.yaml",
        "--data.batch_size=0",
    ]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "moevlm: error: data.batch_size is 0: choose 1 or more\n"  # no "Seed set to 0" above it


@pytest.mark.parametrize("is_mistaken", [False, True])
def test_lightning_is_quiet_until_the_run_begins(is_mistaken: bool) -> None:
    from lightning_moevlm.common.errors import UserError
    from lightning_moevlm.configuration.lightning_notices import quiet_lightning

    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with quiet_lightning() as speak_again:
            logging.getLogger("lightning.pytorch.any").info("Seed set to 0")
            logging.getLogger("lightning.pytorch.any").warning("a warning is shown")
            if is_mistaken:
                raise UserError("no")
            speak_again()
            logger.info("later ones pass")
    except UserError:
        assert is_mistaken
    assert logger.level == logging.INFO
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert shown == ["a warning is shown", *([] if is_mistaken else ["later ones pass"])]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_moevlm.cli.main import main
    from lightning_moevlm.cli.run_command import COMMANDS

    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "sweep run" in told and f"bench {'|'.join(COMMANDS['bench'])} " in told
    assert all(f"moevlm data {name} " in told for name in COMMANDS["data"])
    assert all(kind in told for kind in COMMANDS["data"]["convert"])
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "typed", "hidden"),
    [("replay", "--with CHANGES", "--changes"), ("describe", "-c CONFIGS, --config CONFIGS", "--configs+")],
)
def test_help_names_options_as_they_are_typed(
    command: str, typed: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_moevlm.cli.main import main

    with suppress(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: moevlm {command} ") and typed in " ".join(shown.split())
    assert hidden not in shown and "print_config" not in shown


def test_parts_are_listed_and_described(moevlm: Moevlm, workplace: Path) -> None:
    import json

    moevlm("list", "--json", "parts.json")
    rows = json.loads((workplace / "parts.json").read_text())
    paths = {row["class_path"] for row in rows}
    assert {"lightning_moevlm.model.routers.TopKRouter", "lightning_moevlm.model.losses.RouterZ"} <= paths
    assert all(row["summary"] for row in rows)
    moevlm("describe", "TopKRouter", "--json", "options.json")
    options = {row["option"]: row["default"] for row in json.loads((workplace / "options.json").read_text())}
    assert options.pop("gate").startswith("Gate(jitter=0.0")
    assert options == {"dim": None, "num_experts": None, "top_k": "1", "renormalise": "False"}


def test_without_a_kind_names_are_listed_on_one_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_moevlm.cli.main import main
    from lightning_moevlm.contracts import metric_keys

    monkeypatch.setenv("COLUMNS", "120")
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 48
    assert all(name in shown for name in ("TopKRouter", "RouterZ", "FlightRecorder", "leave_one_out"))
    assert f"{len(metric_keys.ALL)} keys" in shown and "task_loss" not in shown


def test_a_configuration_is_described_by_its_costs(moevlm: Moevlm, workplace: Path) -> None:
    import json

    moevlm("describe", "-c", "conf/quickstart.yaml", "-c", "conf/tasks/captioning.yaml", "--json", "costs.json")
    rows = {row["cost"]: row for row in json.loads((workplace / "costs.json").read_text())}
    parts = [row["value"] for cost, row in rows.items() if cost.startswith("forward, ")]
    assert (
        len(parts) == 6 and sum(parts) == rows["forward"]["value"] > rows["one pass over a pair"]["value"] == 18980864
    )
    assert rows["parameters"]["value"] > rows["active parameters"]["value"] > rows["active parameters, image"]["value"]
    assert rows["activations"]["unit"] == "bytes" and rows["forward"]["per_token"] == rows["forward"]["value"] / 40


def test_types_are_described_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_moevlm.cli.main import main

    monkeypatch.setenv("COLUMNS", "160")  # no line of a type is broken
    assert main(["describe", "MoEFFN"]) == 0
    assert "Callable[[int, int]," in capsys.readouterr().out


def test_a_part_from_elsewhere_is_described_by_its_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_moevlm.cli.main import main

    (tmp_path / "their_package.py").write_text(
        "class TheirRouter:\n    'Sends all to one.'\n    def __init__(self, dim: int, chosen: int = 3): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["describe", "their_package.TheirRouter"]) == 0
    told = capsys.readouterr().out
    assert "their_package.TheirRouter" in told and "Sends all to one." in told and "chosen" in told


def test_the_page_of_qk_clip_names_its_requirement(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_moevlm.cli.main import main

    assert main(["describe", "QKClip"]) == 0
    assert "stabilisers.qk_norm: false" in capsys.readouterr().out


def test_light_commands_do_not_wait_for_lightning() -> None:
    probe = (
        "import sys; import lightning_moevlm.cli.main, lightning_moevlm.cli.run_command; "
        "print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
