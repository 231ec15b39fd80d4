"""Small made-up files in the published formats of benchmarks, with images where their readers look for them."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.data.sources import caption, make_image, write_images


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def gqa_source(folder: Path) -> None:
    """Two questions on each of 8 + 3 + 3 images."""
    for start, name, num_images in ((0, "train", 8), (20, "val", 3), (40, "testdev", 3)):
        ids = [str(2_400_000 + start + i) for i in range(num_images)]
        write_images(folder / "images", [f"{image}.jpg" for image in ids])
        questions = {
            f"{start + 2 * i + k:08d}": {
                "imageId": image,
                "question": ("Is the sky dark?", "What color is the car?")[k],
                "answer": ("yes", "red")[k],
                "fullAnswer": "Yes, the sky is dark.",
                "isBalanced": True,
                "groups": {"global": None, "local": "06-sky_dark"},
                "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": ("verify", "query")[k]},
            }
            for i, image in enumerate(ids)
            for k in (1, 0)
        }
        write_json(folder / f"{name}_balanced_questions.json", questions)


def okvqa_source(folder: Path) -> None:
    """A question on each of 24 + 3 images, in the format of VQA with names of categories beside."""
    for start, name, num_images in ((0, "train2014", 24), (100, "val2014", 3)):
        ids = list(range(start, start + num_images))
        write_images(folder / name, [f"COCO_{name}_{image:012d}.jpg" for image in ids])
        asked = [{"image_id": i, "question": "What is it for?", "question_id": 10 * i} for i in ids]
        answered = [
            {
                "image_id": i,
                "question_id": 10 * i,
                "question_type": ("one", "ten")[i % 2],
                "answer_type": "other",
                "answers": [
                    {"answer_id": n + 1, "answer": answer, "raw_answer": f"{answer}ing", "answer_confidence": "yes"}
                    for n, answer in enumerate(["ride"] * 6 + ["race"] * 4)
                ],
            }
            for i in ids
        ]
        names = {"one": "Vehicles and Transportation", "ten": "Weather and Climate"}
        kind = {"data_type": "mscoco", "data_subtype": name, "license": {}, "info": {}}
        write_json(folder / f"OpenEnded_mscoco_{name}_questions.json", {**kind, "questions": asked})
        annotations = {**kind, "annotations": answered, "question_types": names}
        write_json(folder / f"mscoco_{name}_annotations.json", annotations)


def textvqa_source(folder: Path) -> None:
    """A question on each of 24 + 3 images."""
    for start, name, num_images in ((0, "train", 24), (100, "val", 3)):
        ids = [f"{start + i:016x}" for i in range(num_images)]
        write_images(folder / "train_images", [f"{image}.jpg" for image in ids])
        data = [
            {
                "question": "what is the brand of this camera?",
                "image_id": image,
                "question_id": 34602 + start + i,
                "answers": ["dakota"] * 7 + ["clos culombu"] * 3,
                "image_classes": ["Cassette deck"],
                "set_name": name,
            }
            for i, image in enumerate(ids)
        ]
        content = {"dataset_type": name, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
        write_json(folder / f"TextVQA_0.5.1_{name}.json", content)


def nlvr2_source(folder: Path) -> None:
    """Two statements on each of 6 + 2 + 2 pairs; training images lie in numbered folders."""
    for file, published, num_pairs in (("train", "train", 6), ("dev", "dev", 2), ("test1", "test1", 2)):
        lines = []
        for i in range(num_pairs):
            place = f"images/train/{i % 2}" if published == "train" else published
            write_images(folder / place, [f"{published}-{i}-0-img{side}.png" for side in (0, 1)])
            for k in (0, 1):
                about = {
                    "sentence": f"The left image shows {caption(i)}.",
                    "label": ("True", "False")[k],
                    "identifier": f"{published}-{i}-0-{k}",
                    "left_url": "https://example.org/left.jpg",
                    "right_url": "https://example.org/right.jpg",
                    "synset": "thing",
                    "validation": {"4": "True"},
                }
                lines.append(json.dumps({**about, "directory": i % 2} if published == "train" else about))
        (folder / f"{file}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def karpathy_source(folder: Path, dataset: str = "coco") -> Path:
    """Images with three captions each: 6 train, 2 restval, 3 val, 3 test."""
    splits = ["train"] * 6 + ["restval"] * 2 + ["val"] * 3 + ["test"] * 3
    images = []
    for i, split in enumerate(splits):
        name = f"COCO_val2014_{i:012d}.jpg" if dataset == "coco" else f"{1_000_000 + i}.jpg"
        where = {"filepath": "val2014", "cocoid": 1000 + i} if dataset == "coco" else {}
        (folder / str(where.get("filepath", "."))).mkdir(exist_ok=True)
        (folder / str(where.get("filepath", ".")) / name).write_bytes(make_image(i))
        sentences = [
            {"tokens": caption(3 * i + k).split(), "raw": f"{caption(3 * i + k)} ", "imgid": i, "sentid": 3 * i + k}
            for k in range(3)
        ]
        ids = [each["sentid"] for each in sentences]
        images.append({**where, "sentids": ids, "imgid": i, "sentences": sentences, "split": split, "filename": name})
    path = folder / f"dataset_{dataset}.json"
    write_json(path, {"images": images, "dataset": dataset})
    return path


SOURCES: dict[str, Callable[[Path], object]] = {
    "gqa": gqa_source,
    "okvqa": okvqa_source,
    "textvqa": textvqa_source,
    "nlvr2": nlvr2_source,
}
"""Of a folder, by the kind of conversion."""
