"""`moevlm data convert`: sets of shards from images and texts in other formats, a record for each kind."""

from collections.abc import Callable

from lightning_moevlm.cli.data.convert.benchmarks import (
    ConvertCocoCaptions,
    ConvertCocoVqa,
    ConvertGqa,
    ConvertKarpathy,
    ConvertLlava,
    ConvertNlvr2,
    ConvertOkVqa,
    ConvertTextVqa,
)
from lightning_moevlm.cli.data.convert.sets import ConvertQuestions, ConvertStatements
from lightning_moevlm.cli.data.convert.tables import ConvertCsv, ConvertImg2dataset, ConvertJsonl

COMMANDS: dict[str, Callable[..., object]] = {
    "csv": ConvertCsv,
    "jsonl": ConvertJsonl,
    "img2dataset": ConvertImg2dataset,
    "coco_captions": ConvertCocoCaptions,
    "karpathy": ConvertKarpathy,
    "coco_vqa": ConvertCocoVqa,
    "gqa": ConvertGqa,
    "okvqa": ConvertOkVqa,
    "textvqa": ConvertTextVqa,
    "nlvr2": ConvertNlvr2,
    "llava": ConvertLlava,
    "questions": ConvertQuestions,
    "statements": ConvertStatements,
}
