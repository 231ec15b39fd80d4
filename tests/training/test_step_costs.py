"""Costs of every shipped configuration are those that torch counts, and activations those that autograd keeps."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lightning_moevlm.configuration.resolver import ConfigResolver, build_without_memory
from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.contracts.batch import Answers, Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import BackboneSpec
from lightning_moevlm.model.dispatch import LoopDispatcher
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.objectives import Draws, Joint, MaskedModelling, NextToken, Objective
from lightning_moevlm.training.step.step_costs import activation_bytes, compute_step_costs, full_batch, list_costs
from tests.conftest import PROJECT
from tests.counting import count_flops, kept_bytes, materialise
from tests.small_model import small_limoe, small_vl_moe

QUICK, LIMOE = "conf/quickstart.yaml", "conf/limoe_quickstart.yaml"
OF_RUNS = ("callbacks", "data", "overlays")  # change no model
ESTIMATED = "hugging_face"  # tests/model/backbones/adopted compares its costs
CONFIGS = [
    path
    for path in (PROJECT / "conf").rglob("*.yaml")
    # a full batch has no answers as text, whose length the data decide
    if path.parent.name not in (*OF_RUNS, ESTIMATED) and path.stem != "vqa_as_text"
]
FAST = (QUICK, "conf/tasks/joint.yaml", "conf/routers/hash.yaml")
SLOW = pytest.mark.slow(reason="a configuration of a size or kind that faster ones stand for")


def stacks() -> list[object]:
    """Every shipped configuration of a model, router or task, with the files that it names as those below it."""
    stacked = []
    for path in sorted(CONFIGS):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(PROJECT).as_posix()
        commands = [re.findall(r"-c (\S+)", line) for line in re.findall(r"moevlm fit (.*)", text)]
        files = next((files[: files.index(name) + 1] for files in commands if name in files), [name])
        stacked.append(pytest.param(files, id=name, marks=() if name in FAST else SLOW))
    return stacked


def with_files(part: object, answers: str) -> object:
    """Return options with a list of answers that exists."""
    if isinstance(part, dict):
        return {
            key: answers if key in ("answers", "classes") and isinstance(value, str) else with_files(value, answers)
            for key, value in part.items()
        }
    return part


@pytest.fixture(scope="module")
def resolver() -> ConfigResolver:
    return ConfigResolver()


def with_values(batch: Batch) -> Batch:
    assert batch.images_BRYX is not None and batch.text_BL is not None
    words = torch.randint(4, 400, batch.text_BL.shape, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(batch.images_BRYX.shape, dtype=torch.uint8)
    return batch._replace(
        images_BRYX=images,
        second_images_BRYX=images,
        text_BL=torch.where(batch.text_BL < 4, batch.text_BL, words),
        answers=Answers((("true",),) * batch.num_samples, ("colour",) * batch.num_samples),
    )


@pytest.mark.parametrize("files", stacks())
def test_flops_of_a_shipped_configuration_are_those_that_torch_counts(
    files: list[str], resolver: ConfigResolver, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.json"
    write_answers(AnswerList(("true", "two"), (3, 1), "0" * 64), answers)
    resolved = resolver([PROJECT / file for file in files], {})
    resolved["model"] = with_files(resolved["model"], str(answers))
    module = build_without_memory(resolved, complete=True).eval()
    backbone, objective = module.backbone, module.objective.train()  # Matching runs all of its passes in training alone
    pairs = 2 if backbone.spec.num_patches < 100 else 1  # one of a large model takes seconds
    costs = compute_step_costs(backbone, objective, pairs)
    assert costs.step is not None
    materialise(module)
    batch = with_values(full_batch(backbone.spec, pairs))
    if not files[-1].endswith("relu.yaml"):  # how many experts it takes is learned
        assert costs.step.flops == pytest.approx(count_flops(lambda: objective(backbone, batch, Draws(0))), rel=0.01)
        pair = count_flops(lambda: backbone(batch.images_BRYX, batch.text_BL, batch.text_mask_BL))
        assert costs.card.active_flops_per_sample == pytest.approx(pair / pairs, rel=0.01)
    assert costs.pair.flops == pytest.approx(costs.card.active_flops_per_sample)
    assert all(costs.active_parameters[name] < costs.active_parameters["pair"] for name in ("image", "text"))


@pytest.mark.parametrize(
    "files",
    [[QUICK], pytest.param([LIMOE], marks=SLOW), pytest.param([QUICK, "conf/tasks/captioning.yaml"], marks=SLOW)],
    ids=lambda each: each[-1],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_are_those_that_autograd_keeps(files: list[str], precision: str, resolver: ConfigResolver) -> None:
    module = build_without_memory(resolver([PROJECT / file for file in files], {}), complete=True)
    module.to_empty(device="cpu")
    for part in (module.backbone, module.objective):
        initialise(part, 0)
    batch = with_values(full_batch(module.backbone.spec, 16))
    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed")
    with mixed, kept_bytes(module) as kept:
        module.objective(module.backbone, batch, Draws(0))
    expected = compute_step_costs(module.backbone, module.objective, 16, precision).activation_bytes
    assert expected == pytest.approx(kept[0], rel=0.15)


def test_bytes_by_hand() -> None:
    # 10 numbers of norms and 100 of products, 7 weights: copies of weights only where precisions are mixed
    costs = Costs(kept_by_norms=10.0, kept_by_products=100.0)
    sizes = {name: activation_bytes(costs, name, 7) for name in ("32-true", "bf16-true", "bf16-mixed", "64-true")}
    assert sizes == {"32-true": 440, "bf16-true": 220, "bf16-mixed": 40 + 200 + 14, "64-true": 880}


def test_parts_of_a_pass_by_hand() -> None:
    # width 32, 4 patches of 192 pixels, 8 words, 4 blocks, one on top; blocks 1 and 3 are counted from 0: 1 is sparse
    costs = small_vl_moe().costs({Modality.IMAGE: 4, Modality.TEXT: 8})
    assert costs.embeddings == 2 * 4 * 192 * 32
    assert costs.attention == 4 * (8 * 12 * 32**2 + 4 * 12**2 * 32)
    assert costs.router == 12 * 2 * 32 * 4
    assert costs.experts == 12 * 4 * 32 * 48
    assert costs.feed_forward == 3 * 12 * 4 * 32 * 64
    assert costs.heads == 0


def test_pairs_encoded_apart_take_the_branches_of_their_modalities() -> None:
    model = small_vl_moe()
    lengths = {Modality.IMAGE: 4, Modality.TEXT: 8}
    apart, joined = model.active_parameters(lengths, separate=True), model.active_parameters(lengths)
    # the top block has a feed-forward of 2 x 32 x 64 weights for each modality, and one for pairs
    assert apart - joined == 2 * 32 * 64
    assert model.costs(lengths, separate=True).flops == model.costs(lengths).flops


def test_active_parameters_by_hand() -> None:
    model = small_limoe()
    text = sum(parameter.numel() for parameter in model.text.parameters())
    patches = sum(parameter.numel() for parameter in model.patches.parameters())
    idle = 2 * (2 * 4 * 32 * 48) * 3 / 4  # of 4 experts in two blocks, one works
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.active_parameters((Modality.IMAGE,)) == total - idle - text
    assert model.active_parameters((Modality.TEXT,)) == total - idle - patches


class _Untold(NextToken):
    """An objective that does not say what its heads cost."""

    def head_costs(self, predictions: Mapping[str, int]) -> None:
        return None


def test_unknown_heads_make_the_step_unknown() -> None:
    model = small_vl_moe(dispatcher=LoopDispatcher())
    parts: dict[str, type[Objective]] = {"masked": MaskedModelling, "next": _Untold}
    for objective in (_Untold(model.spec), Joint(model.spec, parts)):
        costs = compute_step_costs(model, objective, 2)
        assert costs.step is None and costs.activation_bytes is None
        values = {row.cost: row.value for row in list_costs(costs)}
        assert values["forward"] is None and values["forward, heads"] is None and values["one pass over a pair"] > 0


def test_answers_of_one_token_are_counted_where_the_data_decide_their_length() -> None:
    model = small_vl_moe(dispatcher=LoopDispatcher())
    whole, answers = (
        compute_step_costs(model, NextToken(model.spec, answers_only=only), 2).step for only in (None, True)
    )
    assert whole is not None and answers is not None
    # of 8 tokens in a text 7 are predicted; of the answer and its [EOS] both
    assert answers.heads == pytest.approx(whole.heads * 2 / 7)
    assert answers.attention == whole.attention and answers.experts == whole.experts


def test_more_pairs_cost_a_sample_as_much() -> None:
    spec = BackboneSpec(32, 16, 8, 300, 8)
    one, many = (compute_step_costs(small_vl_moe(), MaskedModelling(spec), count).step for count in (1, 7))
    assert one is not None and many is not None and many == one * 7
