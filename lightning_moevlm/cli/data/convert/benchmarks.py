"""Converts the published files of benchmarks, and of conversations about images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_moevlm.cli.data.convert.command import ConvertCommand, images_folder
from lightning_moevlm.data.storage.local import local_source

if TYPE_CHECKING:
    from lightning_moevlm.data.write.convert.sources.row_source import Source


@dataclass(frozen=True)
class ConvertCocoCaptions(ConvertCommand):
    """Convert a COCO captions file (captions_train2017.json and the like) and its folder of images.

    Args:
        annotations: The captions file.
        images: Folder of the images; by default the file's own.
        captions: first makes one sample per image, each one per caption; draw is one per image as well, of whose
            captions each epoch draws one, and evaluation counts all. All captions are in the json member.
    """

    annotations: str
    images: str | None = None
    captions: Literal["first", "each", "draw"] = "first"

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.coco_captions import CocoCaptions

        file = local_source(self.annotations, "annotations")
        return CocoCaptions(file, images_folder(self.images) or file.parent, self.name, self.captions)


@dataclass(frozen=True)
class ConvertCocoVqa(ConvertCommand):
    """Convert questions and answers in COCO's style (VQA v1, v2): one sample per image, questions in its json.

    Args:
        questions: The questions file.
        annotations: The file with the answers.
        images: Folder of the images; by default the questions' own.
        image_name: Pattern of image names; by default COCO_SUBTYPE_{image_id:012d}.jpg.
        captions: A COCO captions file of the same images; adds its captions and takes the image names from it.
    """

    questions: str
    annotations: str
    images: str | None = None
    image_name: str | None = None
    captions: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.coco_questions import CocoQuestions

        questions = local_source(self.questions, "questions")
        answers = local_source(self.annotations, "annotations")
        captions = None if self.captions is None else local_source(self.captions, "--captions")
        images = images_folder(self.images) or questions.parent
        return CocoQuestions(questions, answers, images, self.name, self.image_name, captions)


@dataclass(frozen=True)
class ConvertKarpathy(ConvertCommand):
    """Convert dataset_coco.json or dataset_flickr30k.json, the splits that retrieval is reported on.

    An image is one sample with all of its captions. Each epoch of training draws one; evaluation counts all.

    Args:
        file: The file of splits.
        images: Folder that image paths are relative to (for COCO with train2014 and val2014); by default the file's.
    """

    file: str
    images: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.karpathy import KarpathyCaptions

        file = local_source(self.file, "file")
        return KarpathyCaptions(file, images_folder(self.images) or file.parent, self.name)


@dataclass(frozen=True)
class ConvertGqa(ConvertCommand):
    """Convert the balanced questions of GQA: one sample per image, questions in its json.

    Args:
        folder: Folder with train_, val_ and testdev_balanced_questions.json; testdev is the test split.
        images: Folder of the images; by default images in that folder.
    """

    folder: str
    images: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.gqa import Gqa

        folder = local_source(self.folder, "folder")
        return Gqa(folder, images_folder(self.images) or folder / "images", self.name)


@dataclass(frozen=True)
class ConvertOkVqa(ConvertCommand):
    """Convert OK-VQA: one sample per image, questions in its json. Its validation file is the test split.

    Args:
        folder: Folder with OpenEnded_mscoco_train2014_questions.json, mscoco_train2014_annotations.json and those of
            val2014. A tenth of the training images is held out for validation.
        images: Folder with train2014 and val2014; by default that folder.
    """

    folder: str
    images: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.coco_questions import OkVqa

        folder = local_source(self.folder, "folder")
        return OkVqa(folder, images_folder(self.images) or folder, self.name)


@dataclass(frozen=True)
class ConvertTextVqa(ConvertCommand):
    """Convert TextVQA: one sample per image, questions in its json. Its validation file is the test split.

    Args:
        folder: Folder with TextVQA_VERSION_train.json and TextVQA_VERSION_val.json. A tenth of the training images is
            held out for validation.
        images: Folder of the images; by default train_images in that folder.
    """

    folder: str
    images: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.textvqa import TextVqa

        folder = local_source(self.folder, "folder")
        return TextVqa(folder, images_folder(self.images) or folder / "train_images", self.name)


@dataclass(frozen=True)
class ConvertNlvr2(ConvertCommand):
    """Convert NLVR2: one sample per statement, with both images. dev is the validation split, test1 the test split.

    Args:
        folder: Folder with train.json, dev.json and test1.json.
        images: Folder with train (or images/train), dev and test1; by default that folder.
    """

    folder: str
    images: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.benchmarks.nlvr2 import Nlvr2

        folder = local_source(self.folder, "folder")
        return Nlvr2(folder, images_folder(self.images) or folder, self.name)


@dataclass(frozen=True)
class ConvertLlava(ConvertCommand):
    """Convert conversations in LLaVA's format: one sample per conversation, all its turns in its json.

    Args:
        file: JSON list, or JSON lines in a file named .jsonl.
        images: Folder that image paths are relative to; by default the file's own. Paths may not leave it.
        samples: images takes conversations about an image, texts those without one; the others are counted.
    """

    file: str
    images: str | None = None
    samples: Literal["images", "texts"] = "images"

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.llava import Llava

        file = local_source(self.file, "file")
        return Llava(file, images_folder(self.images) or file.parent, self.name, self.samples)
