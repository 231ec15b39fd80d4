"""Scores of generated captions against all captions of their image, by torchmetrics and, for CIDEr, pycocoevalcap.

BLEU-4 (Papineni et al., ACL 2002), ROUGE-L (Lin, 2004; the best reference counts), chrF (Popovic, WMT 2015) and CIDEr-D
(arXiv 1411.5726), over words in lower case without punctuation. COCO's server splits words by another tokeniser, so
compare values of one tool.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torchmetrics.functional.text import bleu_score, chrf_score
from torchmetrics.functional.text.rouge import rouge_score

_Image = TypeVar("_Image", int, str)
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def score_captions(predicted: Mapping[_Image, str], references: Mapping[_Image, Sequence[str]]) -> dict[str, float]:
    """Return scores by name: bleu4, rouge_l and chrf in [0, 1], and cider (0 to 10) where pycocoevalcap is installed.

    Args:
        predicted: one caption of each image.
        references: at least one of each of the same images.
    """
    images = sorted(predicted)
    texts = [_clean(predicted[image]) for image in images]
    known = [[_clean(text) for text in references[image]] for image in images]
    scores = {
        "bleu4": float(bleu_score(texts, known, n_gram=4)),
        "rouge_l": float(rouge_score(texts, known, rouge_keys="rougeL", accumulate="best")["rougeL_fmeasure"]),
        "chrf": float(torch.as_tensor(chrf_score(texts, known, n_word_order=0))),
    }
    if find_spec("pycocoevalcap") is not None:
        from pycocoevalcap.cider.cider import Cider

        given = dict(zip(images, known, strict=True))
        scores["cider"] = float(Cider().compute_score(given, {i: [t] for i, t in zip(images, texts, strict=True)})[0])
    return scores


def _clean(text: str) -> str:
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())
