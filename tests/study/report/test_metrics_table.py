"""The table of all metrics: trivial values and untrained models beside what the arms reach."""

from pathlib import Path
from typing import Any

from lightning_moevlm.contracts.metric_keys import find_trivial
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.tables.effect_tables import metrics_table
from lightning_moevlm.study.report.tables.guide_table import guide_table
from lightning_moevlm.study.report.tables.table import Table
from lightning_moevlm.tracking.read.series import Series
from tests.study.compare.test_results import to_result

ALSO = ["val/recall_at_1/image_to_text", "drop_rate/block1/text", "val/zero_shot/top1"]
VQA = {"primary": {"metric": "val/vqa_accuracy/all", "direction": "higher"}, "also": ALSO}


def measure(run: Any) -> dict[str, Series]:
    """Answers that get better from 0.1; of two runs of `fast` one has another set of held-out images."""
    gain = 0.5 + 0.1 * run.seed + 0.2 * (run.arm == "fast")
    is_larger = run.arm == "fast" and run.seed == 1
    return {
        "val/vqa_accuracy/all": Series((0, 4), (0.1, gain)),
        "val/vqa_majority/all": Series((0, 4), (0.25, 0.25)),
        "val/recall_at_1/image_to_text": Series((4,), (0.75,)),
        "val/chance_recall_at_1/image_to_text": Series((4,), (0.01 if is_larger else 0.02,)),
    }


def compare(folder: Path, study: dict[str, Any]) -> StudyResult:
    return to_result(folder, {"seeds": [0, 1]} | study, lambda run: 5.0, more=measure)


def test_a_row_per_metric_has_its_trivial_value_beside_the_arms(tmp_path):
    table = metrics_table(compare(tmp_path, VQA))
    assert table.columns == ("metric", "trivial", "untrained", "baseline", "fast")
    # 0.5 and 0.6, 0.7 and 0.8: deviations of 0.1 / sqrt(2); chance is 0.02 in `baseline`, (0.02 + 0.01) / 2 in `fast`
    assert table.rows == (
        ("val/vqa_accuracy/all (fraction)", "0.2500", "0.1000", "0.5500 ± 0.0707", "0.7500 ± 0.0707"),
        (f"{ALSO[0]} (fraction)", "0.0150 to 0.0200", "–", "0.7500 ± 0.0000", "0.7500 ± 0.0000"),
        (f"{ALSO[1]} (fraction)", "–", "–", "0.1000 ± 0.0000", "0.1000 ± 0.0000"),
        (f"{ALSO[2]} (fraction)", "–", "–", "–", "–"),
    )


def test_a_guide_gets_titles_and_what_needs_no_training(tmp_path):
    table = guide_table(compare(tmp_path, VQA))
    assert table.columns == ("task, metric", "without training", "baseline", "fast")
    assert table.rows == (
        ("VQA accuracy (all)", "0.250 (VQA accuracy of the best constant answer)", "0.550 ± 0.071", "0.750 ± 0.071"),
        (
            "retrieval recall (k 1, image_to_text)",
            "0.015 to 0.020 (recall of a random ranking)",
            *("0.750 ± 0.000",) * 2,
        ),
        ("dropped pairs (block 1, text)", "–", "0.100 ± 0.000", "0.100 ± 0.000"),
        ("zero-shot classification (top1)", "–", "–", "–"),
    )
    assert guide_table(compare(tmp_path, {})) is None


def test_a_metric_that_no_run_logs_is_told_with_the_nearest_name(tmp_path):
    wrong = "val/recall_at_1/image_to_txt"
    notes = metrics_table(compare(tmp_path, VQA | {"also": [wrong, ALSO[1]]})).notes
    assert notes[2:] == (f"{wrong}: no run has logged it; did you mean {ALSO[0]!r}? correct `also` in the study file.",)


def test_many_arms_are_rows(tmp_path):
    arms = {"baseline": None} | {f"speed{i}": {"model.speed": 0.5 + 0.01 * i} for i in range(1, 9)}
    table: Table = metrics_table(compare(tmp_path, VQA | {"arms": arms}))
    assert table.columns == ("arm", "val/vqa_accuracy/all (fraction)", *(f"{key} (fraction)" for key in ALSO))
    assert [row[0] for row in table.rows] == ["trivial", "untrained", *arms]
    assert table.rows[0] == ("trivial", "0.2500", "0.0200", "–", "–")
    assert table.rows[-1] == ("speed8", "0.5500 ± 0.0707", "0.7500 ± 0.0000", "0.1000 ± 0.0000", "–")


def test_no_table_for_one_metric_without_a_trivial_value(tmp_path):
    assert metrics_table(compare(tmp_path, {})) is None
    alone = metrics_table(compare(tmp_path, {"primary": VQA["primary"]}))
    assert [row[0] for row in alone.rows] == ["val/vqa_accuracy/all (fraction)"]


def test_trivial_values_of_families():
    assert find_trivial("val/accuracy_class") == "val/majority_class"
    assert find_trivial("test/caption/bleu_4") == "test/caption_chance/bleu_4"
    assert find_trivial("val/statement_consistency") == "val/chance_statement_consistency"
    assert find_trivial("val/task_loss") is None
    assert find_trivial("my/own") is None
