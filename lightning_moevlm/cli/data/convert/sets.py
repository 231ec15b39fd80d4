"""Makes sets of questions and of statements from other sets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_moevlm.cli.data.convert.command import ConvertCommand
from lightning_moevlm.data.storage.local import local_source

if TYPE_CHECKING:
    from lightning_moevlm.data.write.convert.sources.row_source import Source


@dataclass(frozen=True)
class ConvertQuestions(ConvertCommand):
    """Make a set with one sample per question of another set (scenes, coco_vqa), with a copy of its image.

    Splits and tokenizer are the other set's; --vocab_size is not used.

    Args:
        folder: Folder of the other set.
    """

    folder: str

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.sets.questions import SetQuestions

        return SetQuestions(local_source(self.folder, "folder"), self.name)


@dataclass(frozen=True)
class ConvertStatements(ConvertCommand):
    """Make a set of true and false statements about pairs of images of a set of scenes, with copies of both.

    Every text comes twice, once true and once false of its images. Splits and tokenizer are the other set's;
    --vocab_size is not used.

    Args:
        folder: Folder of the set of scenes.
        per_image: Statements for each image of the set, on average.
        seed: Other seeds give other pairs and texts.
    """

    folder: str
    per_image: float = 1.0
    seed: int = 0

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.sets.statements import SetStatements

        return SetStatements(local_source(self.folder, "folder"), self.name, self.per_image, self.seed)
