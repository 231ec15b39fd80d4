"""`moevlm replay` on a run of an adopted model that diverged."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.cli.main import main
from lightning_moevlm.cli.runs import replay
from tests.replaying import InProcess
from tests.small_run import budget


@pytest.mark.slow  # a run and three replays of it, each with its start
def test_a_diverged_run_is_replayed_to_the_bit_and_prevented(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = InProcess()
    monkeypatch.setattr(replay, "_engine", lambda: engine)
    words = ["-c", "conf/hugging_face/qwen3_vl_moe.yaml", *budget(8), "--data.batch_size=4", "--data.image_size=32"]
    words += ["--model.gradient.clip_norm=null", "--model.optimizer.init_args.lr=1e20", "--trainer.log_every_n_steps=1"]
    assert main(["fit", *words, "--trainer.logger.init_args.run_name=burnt"]) == 3
    change = "model.optimizer.init_args.lr=1e-3"
    main(["replay", "burnt", "--with", change, "--from-start", "true", "--steps=0", "--json", "found.json"])
    records: list[dict[str, Any]] = json.loads(Path("found.json").read_text())
    by_arm = {record["arm"]: record for record in records}
    assert by_arm["unchanged"]["is_proved"] and "is the run, bit for bit" in by_arm["unchanged"]["sentence"]
    assert by_arm[change]["verdict"] == "would have prevented it"
