"""Any mixture-of-experts model of Hugging Face transformers, or any dense one upcycled, with its routing as plans.

    [image tokens] [text tokens] -> the model without its head -> features -> its own head
    conversations of its own processor, with images inside -> the same

Without a processor (`data.chat: null`) sequences are made of images of one size and of token ids, as for every backbone
here: the image is the prefix of its text, and a question ends in [EOS], which its answer follows. Chat templates and
the special tokens of a checkpoint are then not added.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Chat, JoinedChats, join_chats
from lightning_moevlm.contracts.model_card import Costs, add_costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.contracts.step_records import NamedPlan
from lightning_moevlm.model.backbones.adopted.build import DType, ExpertsBackend, Origin, build, draw, takes
from lightning_moevlm.model.backbones.adopted.cached import (
    CachedTexts,
    Group,
    fresh_offsets,
    lay_out,
    restore_offsets,
    split_by_length,
)
from lightning_moevlm.model.backbones.adopted.head import predict
from lightning_moevlm.model.backbones.adopted.images import image_inputs
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.routing.adopt import adopt, as_before
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass, Tokens
from lightning_moevlm.model.backbones.adopted.sizes import Lengths, costs_of, measure, vision_parameters
from lightning_moevlm.model.backbones.adopted.trained_parts import (
    LoRA,
    Part,
    add_adapters,
    freeze,
    leave_out_frozen,
)
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE
from lightning_moevlm.model.backbones.adopted.upcycling.dense import block_of
from lightning_moevlm.model.backbones.adopted.upcycling.upcycle import UpcycleDense, dense_again, upcycle_dense
from lightning_moevlm.model.backbones.backbone import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.dispatch import Capacity, Dispatcher
from lightning_moevlm.model.layers import check_causal, count_parameters
from lightning_moevlm.model.routers import Router

Joined = tuple[Tensor, Layout, dict[str, Tensor], str]
"""What a pass takes: ids of sequences, their layout, what the vision tower takes, and the source."""


class HuggingFaceModel(Backbone):
    """A model of transformers as backbone; the routing is the model's own, to the bit, or that of a router of ours.

    Args:
        path: a directory that `save_pretrained` wrote, or the name of a model on the hub.
        config: model_type and sizes of a model with random weights, as its configuration in transformers takes them.
            Missing vocab_size and ids of image tokens follow those of the data.
        image_size: pixels, height and width.
        vocab_size: ids of the data; the model may have more.
        max_text_len: longest text L.
        dtype: of weights and computation.
        attention: implementation of attention, such as sdpa or eager; null takes the model's.
        experts_backend: how transformers runs the experts; null takes the model's.
        router: factory (dim, num_experts) -> Router in place of each of the model's. It takes their weights where it
            decides as they do, which is asked of it; else it starts anew. null keeps the model's routers.
        bias_rate: u of loss-free balancing by the model's own e_score_correction_bias, 1e-3 in the papers; null leaves
            the bias as it is, as transformers does.
        frozen: parts that are not trained: vision, connector, language, routers, all_but_routers.
        capacity: places of experts, whichever router chooses them; null is dropless, as transformers is. With several
            experts per token it needs `priority: token`.
        dispatcher: ours in place of the experts' back-end of transformers; null takes `experts_backend`, and
            AutoDispatcher for upcycled experts. AutoDispatcher leaves experts to their own back-end where it was
            measured to be more than 3 % faster, and on a GPU to their grouped_mm.
        upcycle: makes experts of the feed-forwards of a dense model; null takes a model that has experts.
        lora: trains adapters and, by default, routers, and nothing else; null trains everything that is not frozen.
        gradient_checkpointing: layers run again in the backward pass, which needs less memory.
        local_files_only: never fetch; false fetches `path` from the hub.

    Raises:
        UserError: a model that transformers cannot build or whose routers cannot be adopted, or a part it lacks.
    """

    keeps_weights = True  # see `initialise`
    causal = True
    model: Any
    config: Any
    text_config: Any  # of its language model

    def __init__(
        self,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        image_size: int = 224,
        vocab_size: int = 32_000,
        max_text_len: int = 128,
        dtype: DType = "float32",
        attention: str | None = None,
        experts_backend: ExpertsBackend | None = None,
        router: Callable[[int, int], Router] | None = None,
        bias_rate: float | None = None,
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
        upcycle: UpcycleDense | None = None,
        frozen: tuple[Part, ...] = (),
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        local_files_only: bool = True,
    ) -> None:
        super().__init__()
        if dispatcher is not None and experts_backend is not None:
            raise UserError(
                "model.backbone.dispatcher and model.backbone.experts_backend both say how experts run: set one of "
                "them to null"
            )
        origin = Origin(path, config, dtype, attention, experts_backend, local_files_only, vocab_size)
        self.model = build(origin)
        self._is_loaded = path is not None
        self._knows_ids = False  # those of conversations
        self.config = self.model.config
        self.text_config = self.config.get_text_config()
        if getattr(self.config, "is_encoder_decoder", False):
            raise UserError(f"{type(self.model).__name__} has an encoder for texts: choose a decoder-only model")
        if self.text_config.vocab_size < vocab_size:
            raise UserError(
                f"{type(self.model).__name__} embeds {self.text_config.vocab_size} ids, and the data has {vocab_size}: "
                "set data.vocab_size to at most the model's, and give the model's tokenizer to the data"
            )
        self.images = image_inputs(self.config, image_size, path)
        patch_size = image_size if self.images is None else self.images.token_size
        dim, ids = self.text_config.hidden_size, self.text_config.vocab_size
        self.spec = BackboneSpec(dim, image_size, patch_size, ids, max_text_len, predicts_text=True)
        self.current = CurrentPass()
        layers: Mapping[str, AdoptedMoE | UpcycledMoE] = (
            adopt(self.model, self.current, router, bias_rate, capacity, dispatcher)
            if upcycle is None
            else upcycle_dense(self.model, self.current, upcycle, router, bias_rate, lora, capacity, dispatcher)
        )
        for place, layer in layers.items():
            layer.path = f"model.{place}"
        if gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": self.current.checkpoint_contexts}
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        if lora is not None:
            add_adapters(self.model, layers.values(), lora)
        freeze(self.model, list(layers.values()), frozen)
        if path is not None:
            leave_out_frozen(self, list(layers.values()), path)
        check_causal(self)

    def draw_weights(self, seed: int) -> None:
        """Draw the weights of a model that was not loaded, and start what was upcycled; see `initialise`."""
        if self.text_embedding_VD.is_meta:
            return
        if not self._is_loaded:
            with as_before(self.model), dense_again(self.model):  # so that a replaced part moves no other weight
                draw(self.model, seed)
        for layer in self.layers:
            if isinstance(layer, UpcycledMoE):
                layer.start(seed)
                if self._is_loaded:  # its weights will not be drawn again
                    layer.forget_dense()

    @property
    def layers(self) -> list[AdoptedMoE | UpcycledMoE]:
        """The mixtures, in the order of the model."""
        return [module for module in self.model.modules() if isinstance(module, AdoptedMoE | UpcycledMoE)]

    @property
    def text_embedding_VD(self) -> Tensor:
        """Matrix of the head that predicts tokens; in many models it is that of the embedding."""
        return self.model.get_output_embeddings().weight

    def predict_text(self, features_MD: Tensor) -> Tensor:
        """Return the logits of the token that follows, (M, V), as the whole model computes them."""
        return predict(self.model, features_MD)

    def forward(
        self,
        images_BRYX: Tensor | None = None,
        text_BL: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        image_mask_BP: Tensor | None = None,
        separate: bool = False,
        causal: bool = False,
    ) -> BackboneOutput:
        """Encode images, texts or pairs.

        Raises:
            UserError: images for a model without a vision tower, or a pass that its attention does not know.
        """
        if image_mask_BP is not None or separate:
            raise UserError(
                "HuggingFaceModel cannot hide patches or keep image and text apart: choose the objective NextToken"
            )
        return self._run(*self._join(images_BRYX, text_BL, text_mask_BL))[0]

    def _join(self, images_BRYX: Tensor | None, text_BL: Tensor | None, text_mask_BL: Tensor | None) -> Joined:
        """Return ids of sequences, their layout, what the vision tower takes, and the source."""
        ids: list[Tensor] = []
        valid: list[Tensor] = []
        spans: list[Span] = []
        seen: dict[str, Tensor] = {}
        if images_BRYX is not None:
            if self.images is None:
                raise UserError(
                    f"{type(self.model).__name__} has no vision tower: give its sources `modality: text`, or choose a "
                    "vision-language model"
                )
            if takes(getattr(self.model, self.model.base_model_prefix).forward, "image_position_ids"):
                raise UserError(
                    f"{type(self.model).__name__} takes positions of patches, which its own processor makes alone: set "
                    "data.chat.processor to the directory of the model"
                )
            seen = self.images(images_BRYX, self.model.dtype)
            shape = (len(images_BRYX), self.spec.num_patches)
            ids.append(torch.full(shape, self.config.image_token_id, device=images_BRYX.device))
            valid.append(torch.ones(shape, dtype=torch.bool, device=images_BRYX.device))
            spans.append(Span(Modality.IMAGE, 0, self.spec.num_patches))
        if text_BL is not None:
            assert text_mask_BL is not None, "text comes with its mask"
            start = spans[-1].stop if spans else 0
            ids.append(text_BL)
            valid.append(text_mask_BL)
            spans.append(Span(Modality.TEXT, start, start + text_BL.shape[1]))
        source = "pair" if len(spans) == 2 else spans[0].modality.label
        layout = Layout(tuple(spans), torch.cat(valid, dim=1), None, causal=True)
        return torch.cat(ids, dim=1), layout, seen, source

    def read_chats(self, chats: JoinedChats) -> BackboneOutput:
        """Encode conversations with images inside, any number of any size.

        Raises:
            UserError: ids that the model does not embed, or images for a model without a vision tower.
        """
        return self._run(*self._join_chats(chats))[0]

    def _join_chats(self, chats: JoinedChats) -> Joined:
        """Return what `_join` does, of conversations."""
        if not self._knows_ids:
            self._check_ids(chats)
        dtype = self.model.dtype
        seen = {
            name: values.to(dtype) if values.is_floating_point() else values for name, values in chats.images.items()
        }
        layout = Layout((), chats.valid_BS, None, causal=True, inside_BS=chats.modality_BS)
        return chats.ids_BS, layout, seen, "pair" if seen else "text"

    def _check_ids(self, chats: JoinedChats) -> None:
        """Refuse the first conversations of another model's processor."""
        largest, name = int(chats.ids_BS.max()), type(self.model).__name__
        if largest >= self.text_config.vocab_size:
            raise UserError(
                f"data.chat.processor makes the token id {largest}, and {name} embeds {self.text_config.vocab_size}: "
                "give the directory of the model itself"
            )
        body = getattr(self.model, self.model.base_model_prefix).forward
        unknown = [each for each in chats.images if not takes(body, each)]
        if unknown:
            raise UserError(
                f"data.chat.processor makes {', '.join(unknown)} of images, which {name} does not take: give the "
                "directory of the model itself"
            )
        if chats.images and self.images is not None:
            lacking = [each for each in self.images.names if each not in chats.images]
            if lacking:
                raise UserError(
                    f"data.chat.processor makes no {', '.join(lacking)} of images, which {name} needs: give the "
                    "directory of the model itself"
                )
        self._knows_ids = True

    def _run(
        self, ids_BS: Tensor, layout: Layout, seen: dict[str, Tensor], source: str, use_cache: bool = False
    ) -> tuple[BackboneOutput, Any]:
        """Return the output, and the cache of transformers, None without."""
        body = getattr(self.model, self.model.base_model_prefix)
        inputs: dict[str, Any] = {"attention_mask": layout.valid_BS.long()}
        kinds_BS = (layout.modality_BS == Modality.IMAGE).long()
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
            if seen and takes(body.forward, name):
                inputs[name] = kinds_BS
        spans = dict.fromkeys(span.modality for span in layout.spans)
        present = tuple(spans) or (tuple(Modality) if seen else (Modality.TEXT,))
        with self.current.open(Tokens(layout.modality_BS, layout.valid_BS, present)) as recorded:
            found = body(input_ids=ids_BS, use_cache=use_cache, **inputs, **seen)
            plans = tuple(
                NamedPlan(source, block_of(one.layer) or 0, one.layer, one.modalities, one.plan) for one in recorded
            )
        return BackboneOutput(found.last_hidden_state, layout, plans), found.get("past_key_values")

    def prefill(self, images_BRYX: Tensor | None, text_BL: Tensor, text_mask_BL: Tensor) -> tuple[BackboneOutput, Past]:
        """Encode the beginning of texts that are to be continued, those of one length together."""

        def join(rows_G: Tensor, length: int) -> Joined:
            images = None if images_BRYX is None else images_BRYX[rows_G]
            return self._join(images, text_BL[rows_G, :length], text_mask_BL[rows_G, :length])

        return self._begin(text_mask_BL.sum(dim=1), join, self._join(images_BRYX, text_BL, text_mask_BL)[1])

    def prefill_chats(self, chats: Sequence[Chat]) -> tuple[BackboneOutput, Past]:
        """Encode the beginnings of conversations that are to be continued, those of one length together."""
        whole = join_chats(chats)

        def join(rows_G: Tensor, length: int) -> Joined:
            return self._join_chats(join_chats([chats[row] for row in rows_G.tolist()]))

        return self._begin(whole.length_B, join, self._join_chats(whole)[1])

    def _begin(
        self, length_B: Tensor, join: Callable[[Tensor, int], Joined], layout: Layout
    ) -> tuple[BackboneOutput, Past]:
        """Encode each group of one length, without padding inside. join: rows and length -> what a pass takes."""
        groups: list[Group] = []
        features: list[tuple[Tensor, Tensor]] = []
        plans: list[NamedPlan] = []
        for length, rows_G in split_by_length(length_B):
            with fresh_offsets(self.model) as offsets:
                output, cache = self._run(*join(rows_G, length), use_cache=True)
            groups.append(Group(rows_G, cache, offsets))
            features.append((rows_G, output.tokens_BSD))
            plans += output.plans
        tokens_BSD = lay_out(features, (*layout.valid_BS.shape, self.spec.dim))
        return BackboneOutput(tokens_BSD, layout, tuple(plans)), CachedTexts(groups, length_B)

    def extend(self, text_B: Tensor, past: Past) -> Tensor:
        """Return the features of one more token of each text, (B, D); `past` is extended."""
        assert isinstance(past, CachedTexts)
        past.append(text_B)
        parts = [(group.rows_G, self._step(text_B[group.rows_G], group)) for group in past.groups]
        return lay_out(parts, (len(text_B), 1, self.spec.dim))[:, 0]

    def _step(self, text_G: Tensor, group: Group) -> Tensor:
        """Return the features of one more token of each text of a group, (G, 1, D), which its cache then holds."""
        ids_G1 = text_G.unsqueeze(1)
        restore_offsets(self.model, group.offsets)
        tokens = Tokens(
            torch.full_like(ids_G1, Modality.TEXT), torch.ones_like(ids_G1, dtype=torch.bool), (Modality.TEXT,)
        )
        body = getattr(self.model, self.model.base_model_prefix)
        with self.current.open(tokens):
            features: Tensor = body(input_ids=ids_G1, past_key_values=group.cache, use_cache=True).last_hidden_state
        return features

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Estimate them, see `sizes`; of an image also what its vision tower costs."""
        mixtures = [p for layer in self.layers for p in (*layer.experts.parameters(), *layer.router.parameters())]
        left_out = {id(parameter) for parameter in (*mixtures, self.text_embedding_VD)}
        image = num_tokens.get(Modality.IMAGE, 0)
        merged = 1 if self.images is None else self.images.merge**2
        lengths = Lengths(image * merged, image, sum(num_tokens.values()))
        rest = costs_of(self.text_config, measure(self.model, left_out), lengths, self.spec.dim)
        return add_costs([rest, *(layer.costs(num_tokens) for layer in self._reached(tuple(num_tokens)))])

    def active_parameters(self, modalities: Collection[Modality], separate: bool = False) -> float:
        """All but the vision tower of texts, and the experts that a token does not visit."""
        idle = sum(layer.idle_parameters() for layer in self.layers)
        seeing = set() if Modality.IMAGE in modalities else vision_parameters(self.model)
        unseen = sum(parameter.numel() for parameter in self.parameters() if id(parameter) in seeing)
        return count_parameters(self) - idle - unseen

    def num_plans(self, modalities: Collection[Modality]) -> int:
        """Return how many plans `forward` makes: one of every mixture that gets tokens."""
        return len(self._reached(modalities))

    def _reached(self, modalities: Collection[Modality]) -> list[AdoptedMoE | UpcycledMoE]:
        return [layer for layer in self.layers if layer.modality is None or layer.modality in modalities]
