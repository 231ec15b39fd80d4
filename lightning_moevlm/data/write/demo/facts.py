"""Builds the set `facts`: drawings, and a book of random facts about them that a model has to learn by heart.

    red apple owner k e a p          name, relation, four letters

A fact belongs to a name and a relation together; neither tells anything about it alone. So a model needs a memory
addressed by two words. One layer of attention is a poor one, since each word it reads adds its own vote (Elhage et al.
2021, "A mathematical framework for transformer circuits": skip-trigrams). Feed-forwards can (Geva et al., arXiv
2012.14913), and experts are for such memories (Jelassi et al., arXiv 2410.19034: a phone book).

Every sample shows its drawing on another ground, at another place and size. Held-out samples ask for the facts of
training about images that are new. Facts, images and texts follow from (seed, sample number) alone. A larger set begins
with the samples of a smaller one.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.data.format.manifest import Manifest
from lightning_moevlm.data.images.encode import ImageFormat, encode
from lightning_moevlm.data.write.demo.drawing_catalogue import Drawing, first_drawings
from lightning_moevlm.data.write.demo.drawn_set import DrawnSet, SetForm, build_drawn
from lightning_moevlm.data.write.demo.scene_graph import GROUNDS, Box, Group, Scene
from lightning_moevlm.data.write.demo.scenes import Painter
from lightning_moevlm.data.write.set_folder import canonical_json
from lightning_moevlm.data.write.shard_writer import Sample

VERSION = 1
RELATIONS = ("owner", "price", "origin", "maker", "code", "shelf", "model", "batch")
LETTERS = "abcdefghijklmnop"
LENGTH = 4
"""Letters of a fact."""


def build_facts(
    out: Path,
    num_samples: int,
    image_size: int,
    image_format: ImageFormat,
    num_drawings: int,
    num_relations: int,
    seed: int,
    samples_per_shard: int,
    vocab_size: int,
    force: bool,
) -> tuple[Manifest, bool]:
    """Build the set in `out`; return its manifest and whether it was built now.

    Raises:
        UserError: if `out` holds something else, or an argument is out of range.
    """
    if not 32 <= image_size <= 1024:
        raise UserError(f"image_size is {image_size}, allowed are 32 to 1024 pixels")
    check_number("num_samples", num_samples, least=1)
    if not 1 <= num_relations <= len(RELATIONS):
        raise UserError(f"num_relations is {num_relations}, allowed are 1 to {len(RELATIONS)}")
    drawings, relations = first_drawings(num_drawings), RELATIONS[:num_relations]
    drawn = DrawnSet(
        name="facts",
        version=VERSION,
        form=SetForm(image_size, image_format, samples_per_shard, vocab_size),
        arguments={
            "num_samples": num_samples,
            "num_drawings": num_drawings,
            "num_relations": num_relations,
            "seed": seed,
        },
        change="The drawings were rendered to pixels, scaled and laid on tinted grounds.",
        num_samples=num_samples,
        samples=make_samples(num_samples, drawings, relations, image_size, image_format, seed),
    )
    return build_drawn(out, drawn, force)


def make_samples(
    num_samples: int,
    drawings: tuple[Drawing, ...],
    relations: tuple[str, ...],
    image_size: int,
    image_format: ImageFormat,
    seed: int,
) -> Iterator[Sample]:
    """Yield samples; each round goes through all facts once."""
    painter, asked = Painter(image_size), tuple(product(drawings, relations))
    for index in range(num_samples):
        drawing, relation = asked[index % len(asked)]
        random = Random(f"fact/{seed}/{index}")
        extent = random.randint(round(image_size * 0.6), round(image_size * 0.95))
        height, width = painter.stamp(drawing, extent).shape[:2]
        left, top = random.randint(0, image_size - width), random.randint(0, image_size - height)
        box, ground = Box(left, top, left + width, top + height), random.choice(tuple(GROUNDS))
        scene = Scene(ground, (Group(drawing, (box,)),))
        answer = recall(drawing, relation, seed)
        annotation = {
            "name": drawing.name,
            "relation": relation,
            "answer": answer,
            "code_points": drawing.code,
            "ground": ground,
            "box": box,
        }
        yield Sample(
            key=f"fact-{seed}-{index:08d}",
            identity=canonical_json([drawing.code, relation, ground, box]),
            image=encode(painter.paint(scene, ((extent,),)), image_format),
            image_format=image_format,
            caption=f"{drawing.name} {relation} {answer}",
            annotation=canonical_json(annotation),
        )


def recall(drawing: Drawing, relation: str, seed: int) -> str:
    """Return the fact, `k e a p`: of 16 letters four times, drawn for this drawing and relation."""
    random = Random(f"fact/{seed}/{drawing.code}/{relation}")
    return " ".join(random.choice(LETTERS) for _ in range(LENGTH))
