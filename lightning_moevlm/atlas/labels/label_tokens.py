"""Labels every token of a batch of a probe.

A sample has one row of positions, patches first, then text, in whatever passes the model encodes it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.atlas.labels.label import LABELS, UNKNOWN, Label, Null, Values
from lightning_moevlm.atlas.labels.pixels import name_colours
from lightning_moevlm.atlas.labels.scene_objects import (
    GROUND,
    ModelView,
    SceneObject,
    objects_of_patches,
    objects_of_words,
    read_objects,
)
from lightning_moevlm.atlas.labels.words import Tagger, Words, find_words
from lightning_moevlm.atlas.probe.probe_set import ProbeBatch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.layers import PatchCodes

_MOST_CELLS = 4  # of a side, in which positions are counted


class TokenLabels(NamedTuple):
    """The labels of a batch's tokens, int32 (B, S), UNKNOWN where a label says nothing; S: patches, then text."""

    valid_BS: NDArray[np.bool_]
    modality_S: NDArray[np.int32]
    codes: Mapping[str, NDArray[np.int32]]
    """By name of the label."""
    units: Mapping[Null, NDArray[np.int32]]
    """What is exchanged in the null models of units."""
    words: tuple[Words | None, ...]
    """Of each sample."""


class LabelReader:
    """Labels batches, and remembers the values of the labels.

    Args:
        backbone: the model, whose patches and positions are labelled.
        tokenizer: of the texts.
        tagger: gives words their classes; None: none are known.
    """

    def __init__(self, backbone: Backbone, tokenizer: CaptionTokenizer, tagger: Tagger | None = None) -> None:
        self.spec: BackboneSpec = backbone.spec
        self.tokenizer, self.tagger = tokenizer, tagger
        self.grid = self.spec.image_size // self.spec.patch_size
        self.view = ModelView(self.spec.image_size, self.grid)
        self.values: Mapping[str, Values] = {label.name: Values() for label in LABELS}
        own = getattr(backbone, "patch_codes", None)
        self._patch_codes = own if isinstance(own, PatchCodes) else PatchCodes(self.spec.patch_size)

    @property
    def length(self) -> int:
        """S: patches and positions of texts."""
        return self.grid**2 + self.spec.max_text_len

    def known(self) -> tuple[Label, ...]:
        """Return the labels that say something of a token so far."""
        return tuple(label for label in LABELS if self.values[label.name].names)

    def __call__(self, probe: ProbeBatch) -> TokenLabels:
        """Label the tokens of a batch."""
        batch, patches = probe.batch, self.grid**2
        shape = (batch.num_samples, self.length)
        codes = {label.name: np.full(shape, UNKNOWN, np.int32) for label in LABELS}
        units = {null: np.full(shape, UNKNOWN, np.int32) for null in (Null.IDENTITIES, Null.OBJECTS, Null.POSITIONS)}
        units[Null.POSITIONS][:] = np.arange(self.length, dtype=np.int32)
        valid_BS = np.zeros(shape, np.bool_)
        words: list[Words | None] = [None] * batch.num_samples
        objects = [read_objects(annotation) for annotation in probe.annotations]
        if batch.images_BRYX is not None:
            images = slice(len(batch.images_BRYX))
            valid_BS[images, :patches] = True
            self._label_patches(probe, objects, codes)
            device = self._patch_codes.projection_QN.device  # the model's, if they are its own
            code_BP = self._patch_codes(batch.images_BRYX.to(device), None).cpu().numpy()
            units[Null.IDENTITIES][images, :patches] = self.spec.vocab_size + code_BP
        if batch.text_BL is not None and batch.text_mask_BL is not None:
            mask_BL, ids_BL = batch.text_mask_BL.cpu().numpy(), batch.text_BL.cpu().numpy()
            first = batch.num_samples - len(mask_BL)  # a batch of one source holds pairs, or one modality
            length = patches + mask_BL.shape[1]
            valid_BS[first:, patches:length] = mask_BL
            units[Null.IDENTITIES][first:, patches:length] = np.where(mask_BL, ids_BL, UNKNOWN)
            for row, (ids_L, mask_L) in enumerate(zip(ids_BL, mask_BL, strict=True), start=first):
                found = find_words(probe.texts[row], ids_L[mask_L].tolist(), self.tokenizer)
                words[row] = found
                self._label_words(row, found, objects[row], codes)
        self._label_samples(probe, valid_BS, codes)
        modality_S = np.repeat([int(Modality.IMAGE), int(Modality.TEXT)], [patches, self.spec.max_text_len])
        for modality in Modality:
            own_BS = valid_BS & (modality_S == modality)
            if own_BS.any():
                codes["modality"][own_BS] = self.values["modality"].code(modality.label)
            named = codes[f"{modality.label}/object"]
            own = np.where(named >= 0, named * len(Modality) + int(modality), UNKNOWN)
            units[Null.OBJECTS] = np.maximum(units[Null.OBJECTS], own.astype(np.int32))
        return TokenLabels(valid_BS, modality_S.astype(np.int32), codes, units, tuple(words))

    def _label_patches(
        self, probe: ProbeBatch, objects: Sequence[tuple[SceneObject, ...]], codes: Mapping[str, NDArray[np.int32]]
    ) -> None:
        images_BRYX = probe.batch.images_BRYX
        assert images_BRYX is not None
        patches = self.grid**2
        cells = min(self.grid, _MOST_CELLS)
        named = [
            f"row {patch // self.grid * cells // self.grid + 1}, col {patch % self.grid * cells // self.grid + 1}"
            for patch in range(patches)
        ]
        codes["image/position"][: len(images_BRYX), :patches] = self.values["image/position"].codes(named)
        for row, colours in enumerate(name_colours(images_BRYX, self.grid)):
            codes["image/colour"][row, :patches] = self.values["image/colour"].codes(colours)
            stored = probe.stored_sizes[row]
            if objects[row] and stored is not None:
                placed = objects_of_patches(objects[row], self.view, stored)
                found = [None if number is None else objects[row][number] for number in placed]
                self._put_objects("image", row, range(patches), found, codes, outside=GROUND)

    def _label_words(
        self, row: int, found: Words, objects: Sequence[SceneObject], codes: Mapping[str, NDArray[np.int32]]
    ) -> None:
        first = self.grid**2
        positions = range(first, first + len(found.tokens))
        codes["text/word"][row, positions] = self.values["text/word"].codes(found.tokens)
        codes["text/position"][row, positions] = self.values["text/position"].codes(
            [_bucket(place) for place in range(len(found.tokens))]
        )
        if self.tagger is not None:
            classes = self.tagger.tag(found.words)
            tagged = [None if number is None else classes[number] for number in found.of_token]
            codes["text/word class"][row, positions] = self.values["text/word class"].codes(tagged)
        if objects:
            named = objects_of_words(objects, found.words)
            numbers = [None if number is None else named[number] for number in found.of_token]
            self._put_objects("text", row, positions, [None if n is None else objects[n] for n in numbers], codes, None)

    def _put_objects(
        self,
        kind: str,
        row: int,
        positions: range,
        found: Sequence[SceneObject | None],
        codes: Mapping[str, NDArray[np.int32]],
        outside: str | None,
    ) -> None:
        values: dict[str, list[str | None]] = {
            "object": [outside if each is None else each.name for each in found],
            "category": [outside if each is None else each.category for each in found],
            "object colour": [None if each is None else each.colour for each in found],
        }
        for name, of_tokens in values.items():
            label = f"{kind}/{name}"
            codes[label][row, positions] = self.values[label].codes(of_tokens)

    def _label_samples(
        self, probe: ProbeBatch, valid_BS: NDArray[np.bool_], codes: Mapping[str, NDArray[np.int32]]
    ) -> None:
        """Label all tokens of a sample by the kind of its question and by its class."""
        answers, patches = probe.batch.answers, self.grid**2
        for row, annotation in enumerate(probe.annotations):
            written = annotation.get("kind")
            kind = answers.kinds[row] if answers is not None and answers.kinds[row] else written
            of_sample = {"question kind": kind if isinstance(kind, str) else "", "class": probe.classes[row]}
            for name, value in of_sample.items():
                for modality, span in (("image", slice(patches)), ("text", slice(patches, None))):
                    label = f"{modality}/{name}"
                    if value and valid_BS[row, span].any():
                        here = codes[label][row, span]
                        here[valid_BS[row, span]] = self.values[label].code(value)


def _bucket(place: int) -> str:
    """Return the name of a position in a text: singly up to 3, then in powers of two."""
    if place < 4:
        return str(place)
    low = 4
    while place >= 2 * low:
        low *= 2
    return f"{low} to {2 * low - 1}"
