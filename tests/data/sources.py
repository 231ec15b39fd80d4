"""Small folders of images with their tables, before a conversion."""

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_moevlm.data.images.encode import ImageFormat
from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, Licence, SetOptions, convert
from lightning_moevlm.data.write.convert.shard_image import ImageOptions
from lightning_moevlm.data.write.convert.sources.row_source import Source

CC0 = Licence("CC0", "", "")
WORDS = ("red", "green", "blue", "round", "flat", "tall", "old", "new")


def write_set(
    source: Source, out: Path, max_bad: int = 0, *, image_format: ImageFormat = "jpg", licence: Licence = CC0
) -> Converted:
    """Convert a source to shards of 16 samples with images as they are, 400 token ids."""
    form = SetOptions(ImageOptions(image_format, None), 16, 400)
    return convert(source, out, licence, form, ConvertOptions(max_bad, 1, False))


def make_image(number: int, extension: str = "jpg", size: tuple[int, int] = (40, 32)) -> bytes:
    """An image of noise that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return out.getvalue()


def caption(number: int) -> str:
    """A caption that no other number below 512 has."""
    return " ".join(WORDS[number // 8**place % 8] for place in range(3)) + f" thing, {number % 5} of them"


def write_images(folder: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_image(number, Path(name).suffix[1:]))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def csv_source(folder: Path, num_rows: int) -> Path:
    """`folder/captions.csv` and `folder/images/`; every fifth image is a PNG."""
    names = [f"{i // 10}/{i}.{'png' if i % 5 == 0 else 'jpg'}" for i in range(num_rows)]
    write_images(folder / "images", names)
    rows = [[name, caption(i), f"source {i}"] for i, name in enumerate(names)]
    return write_csv(folder / "captions.csv", ["image", "caption", "page"], rows)


def jsonl_source(folder: Path, num_rows: int) -> Path:
    write_images(folder, [f"{i}.jpg" for i in range(num_rows)])
    rows = [{"image": f"{i}.jpg", "caption": caption(i), "about": {"boxes": [[i, 1, 2, 3]]}} for i in range(num_rows)]
    table = folder / "rows.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return table


def coco_source(folder: Path, num_images: int) -> Path:
    """Two captions per image; ids are not in the order of the file."""
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(num_images)]
    write_images(folder, names)
    images = [{"id": i, "file_name": name, "height": 32, "width": 40} for i, name in reversed(list(enumerate(names)))]
    annotations = [
        {"id": 2 * i + second, "image_id": i, "caption": f"{caption(i)}{', again' if second else ''}"}
        for i in range(num_images)
        for second in (1, 0)
    ]
    path = folder / "captions_train2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}), encoding="utf-8")
    return path


def vqa_source(folder: Path, num_images: int) -> tuple[Path, Path]:
    """Two questions per image, beside `coco_source`'s images."""
    asked = [
        {"image_id": i, "question_id": 10 * i + k, "question": ("How many things?", "Is it red?")[k]}
        for i in range(num_images)
        for k in (1, 0)
    ]
    answered = [
        {
            "question_id": 10 * i + k,
            "image_id": i,
            "answer_type": ("number", "yes/no")[k],
            "question_type": ("how many", "is it")[k],
            "multiple_choice_answer": (str(i % 5), ("no", "yes")[caption(i).startswith("red")])[k],
            "answers": [{"answer": str(i % 5), "answer_id": 1}, {"answer": "many", "answer_id": 2}] if k == 0 else [],
        }
        for i in range(num_images)
        for k in (0, 1)
    ]
    questions, annotations = folder / "v2_questions.json", folder / "v2_annotations.json"
    questions.write_text(json.dumps({"data_subtype": "train2014", "questions": asked}), encoding="utf-8")
    annotations.write_text(json.dumps({"annotations": answered}), encoding="utf-8")
    return questions, annotations


def img2dataset_source(
    folder: Path, num_tars: int, per_tar: int, extension: str = "jpg", named: str | None = None
) -> Path:
    """Tars as img2dataset writes them, with statistics and (empty) tables beside; failed downloads leave gaps.

    named: what images are called, if not by their format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(per_tar):
                index = number * per_tar + i
                key = f"{number:05d}{2 * i:04d}"
                about = {"url": f"https://example.org/{index}.jpg", "key": key, "status": "success", "sha256": None}
                for ending, data in (
                    (named or extension, make_image(index, extension)),
                    ("txt", caption(index).encode()),
                    ("json", json.dumps(about, indent=4).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size, member.mtime = len(data), 1_600_000_000 + index
                    tar.addfile(member, io.BytesIO(data))
        stats = {"count": 2 * per_tar, "successes": per_tar, "failed_to_download": per_tar, "failed_to_resize": 0}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats), encoding="utf-8")
        (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return folder
