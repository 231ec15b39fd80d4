"""Conversations of a model's own processor: images inside, answers alone predicted. Extra `hf`; skipped if absent."""

import importlib.util
import json
import pickle
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import AdamW

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.contracts.batch import join_chats
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.images.augment import Augment
from lightning_moevlm.data.read.join_batches import join_batches
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.text.chat import ChatMaker, ChatOptions
from lightning_moevlm.data.write.convert.sources.sets.questions import SetQuestions
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.generation import Decoding, generate_replies, rate_replies
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import AnswerScores, CaptionScores, Liveness, Telemetry
from tests.data.sources import write_set
from tests.model.backbones.adopted.small_chat import (
    IM_END,
    IMAGE_PAD,
    LLAVA_CHAT,
    PICTURES,
    QWEN_CHAT,
    TURNS,
    batch_of,
    make_chats,
    messages_of,
    plain_model,
    qwen_processor,
    save_llava,
    save_tokenizer,
)
from tests.model.backbones.adopted.small_hugging_face import OLMOE, small_hugging_face
from tests.small_model import small_decoder
from tests.training.callbacks.asked_run import Tagged


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ChatMaker:
    folder = tmp_path_factory.mktemp("qwen")
    made = ChatMaker(ChatOptions(str(folder)))
    made.__dict__["processor"] = qwen_processor(folder)  # AutoProcessor needs torchvision for videos
    return made


def test_conversations_are_those_of_the_processor(qwen: ChatMaker, llava: Path) -> None:
    for maker in (qwen, ChatMaker(ChatOptions(str(llava)))):
        for chat, image, turns in zip(make_chats(maker), PICTURES, TURNS, strict=True):
            text = maker.processor.apply_chat_template(messages_of(turns), tokenize=False)
            whole = maker.processor(text=[text], images=[image], return_tensors="pt")
            assert torch.equal(chat.ids_S, whole["input_ids"][0])
            assert all(torch.equal(values, whole[name]) for name, values in chat.images.items())
            assert set(chat.images) == set(whole) - {"input_ids", "attention_mask", "mm_token_type_ids"}
            said = maker.tokenizer.decode(chat.ids_S[chat.answer_S])
            assert said == "".join(f"{turn.answer}<|im_end|>" for turn in turns)
            asked = maker.processor.apply_chat_template(
                messages_of(turns)[:1], add_generation_prompt=True, tokenize=False
            )
            prompt = maker.processor(text=[asked], images=[image], return_tensors="pt")
            assert torch.equal(chat.prompt().ids_S, prompt["input_ids"][0])
            placed = chat.ids_S[chat.modality_S == int(Modality.IMAGE)]
            assert set(placed.tolist()) == {maker.processor.image_token_id}
            assert len(placed) == int((chat.ids_S == maker.processor.image_token_id).sum()) > 0


def test_images_of_any_size_stand_inside_as_in_the_whole_model(qwen: ChatMaker) -> None:
    chats, model = make_chats(qwen), small_hugging_face(QWEN_CHAT)
    assert len({tuple(chat.images["pixel_values"].shape) for chat in chats}) == 3
    output = model.read_chats(join_chats(chats))
    texts = [qwen.processor.apply_chat_template(messages_of(turns), tokenize=False) for turns in TURNS]
    inputs = qwen.processor(text=texts, images=PICTURES, padding=True, padding_side="right", return_tensors="pt")
    valid_BS = inputs["attention_mask"].bool()
    logits = model.predict_text(output.tokens_BSD)
    assert torch.equal(logits[valid_BS], model.model(**inputs).logits[valid_BS])
    assert torch.equal(output.layout.valid_BS, valid_BS)
    assert torch.equal(output.layout.modality_BS == int(Modality.IMAGE), inputs["mm_token_type_ids"] == 1)
    numbers = [int((inputs["mm_token_type_ids"] == 1).sum()), int(valid_BS.sum())]
    for named in output.plans:
        assert named.source == "pair"
        loads = named.plan.chosen_loads(named.plan.modality_T, 2).sum(dim=1).tolist()
        assert loads == [2 * numbers[0], 2 * (numbers[1] - numbers[0])]


def test_only_answers_are_predicted_and_a_step_is_measured_before_it_runs(qwen: ChatMaker) -> None:
    chats, model = make_chats(qwen), small_hugging_face(QWEN_CHAT)
    module = VisionLanguageModule(model, partial(NextToken, answers_only=True))
    batch = batch_of(chats)
    output = module.objective(model, batch, module.draws("train"))
    joined = join_chats(chats)
    target_M = joined.ids_BS[:, 1:][joined.answer_BS[:, 1:]]
    features_MD = model.read_chats(joined).tokens_BSD[:, :-1][joined.answer_BS[:, 1:]]
    expected = torch.nn.functional.cross_entropy(model.predict_text(features_MD), target_M)
    torch.testing.assert_close(output.terms["caption"].raw, expected)
    size = module.objective.size(batch.without_pixels())
    assert size is not None and output.terms["caption"].num_predictions == int(size.predictions["caption"]) == len(
        target_M
    )
    plan = output.plans[0].plan
    tokens = [int((plan.valid_T & (plan.modality_T == int(modality))).sum()) for modality in Modality]
    assert size.passes["pair"].tokens_A.tolist() == tokens
    assert size.passes["pair"].sequences_A.tolist() == [3, 3] and int(size.passes["pair"].sequences) == 3
    parts = [module.objective(model, batch.select([row]), module.draws("train")).terms["caption"] for row in range(3)]
    total = sum(part.raw * part.num_predictions for part in parts)  # type: ignore[misc]
    torch.testing.assert_close(total / len(target_M), expected)


def test_conversations_stay_with_their_samples(qwen: ChatMaker) -> None:
    chats = make_chats(qwen)
    batch = batch_of(chats)
    assert batch.first(2).chats == tuple(chats[:2])
    assert batch.select([2, 0]).chats == (chats[2], chats[0])
    both = join_batches({0: batch, 1: batch.first(1)}, ["one", "other"])
    assert both.chats == (*chats, chats[0])
    assert all(not chat.images for chat in batch.without_pixels().chats or ())


def test_replies_are_those_that_transformers_generates(llava: Path) -> None:
    maker, model = ChatMaker(ChatOptions(str(llava))), small_hugging_face(LLAVA_CHAT).eval()
    logits = partial(NextToken(model.spec).logits, model)
    prompts = [chat.prompt() for chat in make_chats(maker)]
    found = generate_replies(model, logits, prompts, maker.ends, Decoding(max_new_tokens=5))
    plain = plain_model(model)
    for row, prompt in enumerate(prompts):
        ids_1S = prompt.ids_S.unsqueeze(0)
        expected = plain.generate(
            input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S), **prompt.images, max_new_tokens=5,
            do_sample=False, eos_token_id=IM_END, pad_token_id=0,
        )[0, len(prompt.ids_S) :]  # fmt: skip
        assert found.text_BN[row, : len(expected)].tolist() == expected.tolist()
    replies = [found.text_BN[row].tolist() for row in range(3)]
    rated = rate_replies(model, logits, prompts, replies)
    torch.testing.assert_close(rated.diagonal(), found.log_prob_B)  # of what was generated, token by token


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=5), Decoding("beam", max_new_tokens=4, num_beams=2)])
def test_replies_after_images_of_any_size_are_those_of_whole_passes(qwen: ChatMaker, decoding: Decoding) -> None:
    """Each conversation has its own offset of positions; every new token is one position, not the whole again."""
    model = small_hugging_face(QWEN_CHAT).eval()
    objective = NextToken(model.spec)

    def logits(features_MD: Tensor) -> Tensor:
        without_image = torch.zeros(304).index_fill(0, torch.tensor([IMAGE_PAD]), -torch.inf)
        return objective.logits(model, features_MD) + without_image[: objective.logits(model, features_MD).shape[1]]

    prompts = [chat.prompt() for chat in make_chats(qwen)]
    prompts.append(prompts[0]._replace(ids_S=prompts[0].ids_S.clone()))  # two of one length
    positions: list[int] = []
    model.model.get_decoder().register_forward_pre_hook(
        lambda module, args, named: positions.append(named["inputs_embeds"].shape[0] * named["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    found = generate_replies(model, logits, prompts, qwen.ends, decoding)
    steps, rows = found.text_BN.shape[1] - 1, len(prompts) * (2 if decoding.method == "beam" else 1)
    assert sum(positions) == sum(len(prompt.ids_S) for prompt in prompts) + steps * rows
    for row, prompt in enumerate(prompts):
        reply = found.text_BN[row].tolist()
        reply = reply[: reply.index(IM_END) + 1] if IM_END in reply else reply
        whole = join_chats([prompt.reply(reply)])
        log_prob_SV = logits(model.read_chats(whole).tokens_BSD[0]).log_softmax(dim=-1)
        expected = sum(log_prob_SV[len(prompt.ids_S) - 1 + place, token] for place, token in enumerate(reply))
        torch.testing.assert_close(expected, found.log_prob_B[row], rtol=1e-4, atol=1e-4)
        rated = rate_replies(model, logits, prompts, [[7, IM_END], reply])  # two lengths, or one
        torch.testing.assert_close(rated[row, 1], found.log_prob_B[row], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def questions(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets") / "questions"
    write_set(SetQuestions(scenes_root, None), root)
    return root


def trained(model: HuggingFaceModel, data: ShardDataModule, steps: int, *callbacks: Any) -> tuple[Trainer, Tagged]:
    module = VisionLanguageModule(
        model, partial(NextToken, answers_only=True), optimizer=partial(AdamW, lr=1e-2),
        losses=AuxiliaryLosses(load_balance=LoadBalance(weight=0.01, per_modality=True), router_z=None),
    )  # fmt: skip
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=(logger := Tagged()), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, limit_val_batches=2,
        callbacks=[Liveness(), Telemetry(), *callbacks], accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer, logger


def test_a_model_learns_to_answer_and_is_judged(questions: Path, llava: Path, tmp_path: Path) -> None:
    """Micro-batches, receipts, loads by modality, and VQA accuracy both by generation and by likelihood."""
    write_answers(AnswerList(("yes", "no", "two"), (3, 2, 1), "digest"), tmp_path / "answers.json")

    def data(**options: Any) -> ShardDataModule:
        chat = ChatOptions(str(llava), **options)
        return ShardDataModule(str(questions), 8, 16, 40, 400, annotation="answers", append_answer=True, chat=chat)

    model = small_hugging_face(LLAVA_CHAT)
    made = data()
    trainer, logger = trained(model, made, 12, AnswerScores(Decoding(max_new_tokens=3)))
    losses = [value for _, value in logger.points["train/task_loss"]]
    assert losses[-1] < 0.7 * losses[0]
    assert logger.tags["receipt/losses.load_balance"].startswith("alive")
    assert sum(logger.points[f"load/block1/image/expert{e}"][0][1] for e in range(4)) == pytest.approx(1.0)
    assert (
        0 <= trainer.callback_metrics["val/vqa_accuracy/all"] < trainer.callback_metrics["val/vqa_majority/all"] + 0.5
    )
    module = trainer.lightning_module
    chosen = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=2,
        callbacks=[AnswerScores(answers=str(tmp_path / "answers.json"))],
    )  # fmt: skip
    (scores,) = chosen.validate(module, data(), verbose=False)
    assert scores["val/vqa_accuracy/all"] > 0  # the untrained answer would be gibberish
    assert made.manifest_digest != data(template=_template(llava, tmp_path)).manifest_digest
    batch = next(iter(data().val_dataloader()))
    longest = max(len(chat.ids_S) for chat in batch.chats)
    shorter = next(iter(data(max_len=longest - 1).val_dataloader()))
    assert batch.num_cut == (0,) != shorter.num_cut


def _template(llava: Path, folder: Path) -> str:
    file = folder / "other.jinja"
    file.write_text((llava / "chat_template.jinja").read_text("utf-8").replace("user", "human"), encoding="utf-8")
    return str(file)


def test_a_checkpoint_is_tuned_and_judged_from_the_command_line(
    moevlm: Callable[..., str], workplace: Path, questions: Path
) -> None:
    """conf/hugging_face/checkpoint.yaml, over the base of the study."""
    pytest.importorskip("peft", reason="needs the extra hf")
    folder = workplace / "checkpoint"
    folder.mkdir()
    model = HuggingFaceModel(config=LLAVA_CHAT, image_size=16, vocab_size=400, max_text_len=8)
    plain_model(model).save_pretrained(folder)
    save_llava(folder)
    files = ("qwen3_vl_moe", "questions", "checkpoint")
    moevlm(
        "fit", *(word for name in files for word in ("-c", f"conf/hugging_face/{name}.yaml")),
        f"--model.backbone.path={folder}", f"--data.root={questions}", "--data.image_size=16", "--data.vocab_size=400",
        "--data.batch_size=2", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=2",
        "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1",
    )  # fmt: skip
    (checkpoint,) = workplace.glob("runs/*/*/checkpoints/last.ckpt")
    moevlm("validate", "--run", str(checkpoint.parents[1]), f"--trainer.callbacks.answers={_answers(workplace)}")
    with sqlite3.connect("runs/mlflow.db") as store:
        scores = store.execute("select run_uuid, value from metrics where key = 'val/vqa_accuracy/all'").fetchall()
    assert len({run for run, _ in scores}) == 2  # the run, and its evaluation by likelihood


def _answers(folder: Path) -> Path:
    write_answers(AnswerList(("yes", "no"), (2, 1), "digest"), folder / "few.json")
    return folder / "few.json"


def test_captions_answer_the_prompt_and_are_scored(scenes_root: Path, llava: Path) -> None:
    chat = ChatOptions(str(llava), system="You see scenes.", caption_prompt="What is in it?")
    data = ShardDataModule(str(scenes_root), 16, 16, 24, 400, chat=chat)
    batch = next(iter(data.val_dataloader()))
    assert data.chats is not None and batch.chats is not None
    said = data.chats.tokenizer.decode(batch.chats[0].prompt().ids_S)
    assert said.startswith("<|im_start|>system\nYou see scenes.<|im_end|>\n<|im_start|>user\n<image>")
    assert said.endswith("What is in it?<|im_end|>\n<|im_start|>assistant\n")
    answer = data.chats.tokenizer.decode(batch.chats[0].ids_S[batch.chats[0].answer_S])
    assert answer.removesuffix("<|im_end|>") == data.tokenizer.decode(batch.text_BL[0].tolist())
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=1,
        callbacks=[CaptionScores(Decoding(max_new_tokens=3))],
    )  # fmt: skip
    module = VisionLanguageModule(small_hugging_face(LLAVA_CHAT), NextToken)
    assert "val/caption/bleu4" in trainer.validate(module, data, verbose=False)[0]


def test_language_models_converse_about_texts_alone(scenes_root: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    sources = {"texts": Source(str(scenes_root), modality="text")}
    data = ShardDataModule(None, 4, 16, 24, 400, sources=sources, chat=ChatOptions(str(tmp_path)))  # type: ignore[arg-type]
    batch = next(iter(data.val_dataloader()))
    module = VisionLanguageModule(small_hugging_face(OLMOE | {"vocab_size": 300}), NextToken)
    output = module.objective(module.backbone, batch, module.draws("train"))
    assert set(output.terms) == {"text"}
    with pytest.raises(UserError, match="takes no images: give its sources `modality: text`"):
        next(iter(ShardDataModule(str(scenes_root), 4, 16, 24, 400, chat=ChatOptions(str(tmp_path))).val_dataloader()))


def test_mistakes_are_explained(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "thinks.jinja").write_text(
        (llava / "chat_template.jinja")
        .read_text("utf-8")
        .replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    )
    (tmp_path / "open.jinja").write_text("{{ messages")
    (tmp_path / "blind.jinja").write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}")
    for options, message in (
        ({"processor": str(tmp_path / "nothing")}, "cannot be loaded.*give the directory of a model"),
        ({"max_len": 10}, r"have \d+ tokens, and data.chat.max_len is 10: raise it"),
        ({"options": {"max_pixels": 64}}, "LlavaImageProcessor.* does not read: name some of .* size"),
        ({"options": {"size": {"height": "x", "width": 2}}}, "the processor of .* refuses a conversation: .*Error"),
        ({"template": str(tmp_path / "none.jinja")}, "data.chat.template .* cannot be read"),
        (
            {"template": str(tmp_path / "open.jinja")},
            "the chat template of .* refuses .*TemplateSyntaxError: unexpected",
        ),
        (
            {"template": str(tmp_path / "blind.jinja")},
            "the processor of .* refuses a conversation: .*; give a data.chat",
        ),
        ({"template": str(tmp_path / "thinks.jinja")}, "in training than in generation, as templates with thoughts do"),
    ):
        maker = ChatMaker(ChatOptions(**({"processor": str(llava)} | options)))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            maker.make([PICTURES[0]], TURNS[0])
    with pytest.raises(UserError, match=r"data\.augment changes.*set data\.augment or data\.chat to null"):
        ShardDataModule("nowhere", 4, 16, 24, 400, chat=ChatOptions(str(llava)), augment=Augment())
    with pytest.raises(UserError, match="max_len is 1"):
        ChatOptions(str(llava), max_len=1)
    save_tokenizer(tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template: set data\.chat\.template"):
        _ = ChatMaker(ChatOptions(str(tmp_path / "bare"))).processor
    chats = join_chats(make_chats(ChatMaker(ChatOptions(str(llava)))))
    with pytest.raises(UserError, match=r"has no processor of its own: set data\.chat to null"):
        small_decoder().read_chats(chats)
    with pytest.raises(UserError, match="makes pixel_values of images, which OlmoeForCausalLM does not take"):
        small_hugging_face(OLMOE).read_chats(chats)
    with pytest.raises(UserError, match=r"makes the token id \d+, and LlavaForConditionalGeneration embeds 304"):
        small_hugging_face(LLAVA_CHAT).read_chats(chats._replace(ids_BS=chats.ids_BS + 300))
    with pytest.raises(UserError, match="makes no image_grid_thw of images, which Qwen3VLMoeForConditionalGeneration"):
        small_hugging_face(QWEN_CHAT).read_chats(chats)
    save_tokenizer(tmp_path / "qwen")
    for name, kind in (("preprocessor", "image_processor"), ("video_preprocessor", "video_processor")):
        of_kind = {"image_processor": "Qwen2VLImageProcessor", "video_processor": "Qwen3VLVideoProcessor"}[kind]
        content = {f"{kind}_type": of_kind, "processor_class": "Qwen3VLProcessor"}
        (tmp_path / f"qwen/{name}_config.json").write_text(json.dumps(content))
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(
            UserError, match=r"qwen needs the package torchvision.*: pip install torchvision, the release"
        ):
            _ = ChatMaker(ChatOptions(str(tmp_path / "qwen"))).processor
    sent = pickle.loads(pickle.dumps(ChatMaker(ChatOptions(str(llava)))))  # to a worker
    assert sent.options.processor == str(llava)
