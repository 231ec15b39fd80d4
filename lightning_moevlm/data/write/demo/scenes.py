"""Builds the set `scenes`: compositional scenes with known content.

One to four OpenMoji drawings on a tinted ground, with a caption, questions and answers, true and false statements and
the scene graph. Content, places and sentences follow from (seed, sample number) alone. A larger set begins with the
samples of a smaller one, and the same arguments give the same bytes.

Layout: the image is divided into 1, 2 or 4 cells. Every drawing gets a cell, a size and a place in it, so drawings
never overlap, and most pairs are clearly left or right, above or below each other.
"""

from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.data.format.manifest import Manifest
from lightning_moevlm.data.images.encode import ImageFormat, encode, lay_on
from lightning_moevlm.data.write.demo.drawing_catalogue import Drawing, first_drawings
from lightning_moevlm.data.write.demo.drawn_set import DrawnSet, SetForm, build_drawn
from lightning_moevlm.data.write.demo.openmoji_art import rasterise
from lightning_moevlm.data.write.demo.scene_graph import GROUNDS, Box, Group, Scene, facts
from lightning_moevlm.data.write.demo.scene_language import caption, questions, statements
from lightning_moevlm.data.write.set_folder import canonical_json
from lightning_moevlm.data.write.shard_writer import Sample

VERSION = 2  # 2: relations are objects, so that every field of the json has one type
MIN_ALPHA = 16
"""Alpha (of 255); fainter edge pixels are outside the box."""


def build_scenes(
    out: Path,
    num_samples: int,
    image_size: int,
    image_format: ImageFormat,
    num_drawings: int,
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
    world = first_drawings(num_drawings)
    painter = Painter(image_size)
    drawn = DrawnSet(
        name="scenes",
        version=VERSION,
        form=SetForm(image_size, image_format, samples_per_shard, vocab_size),
        arguments={"num_samples": num_samples, "num_pictures": num_drawings, "seed": seed},  # as in sets built before
        change="The drawings were rendered to pixels, scaled and arranged on tinted grounds.",
        num_samples=num_samples,
        samples=(make_sample(i, world, painter, image_format, seed) for i in range(num_samples)),
    )
    return build_drawn(out, drawn, force)


class Painter:
    """Draws scenes of one size, and keeps each rasterised drawing."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self._stamps: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def stamp(self, drawing: Drawing, extent: int) -> NDArray[np.uint8]:
        """Return the drawing as RGBA, cropped tightly, its longer side about `extent` pixels."""
        key = (drawing.code, extent)
        if key not in self._stamps:
            # the drawing fills only a part of OpenMoji's square, so the square must be larger
            canvas = max(1, round(extent / _measure_filled_share(drawing.code)))
            self._stamps[key] = _cut_tight(rasterise(drawing.code, canvas))
        return self._stamps[key]

    def paint(self, scene: Scene, extents: tuple[tuple[int, ...], ...]) -> NDArray[np.uint8]:
        """Return the scene's RGB pixels. extents: stamp size of every box, by group."""
        pixels = np.empty((self.image_size, self.image_size, 3), dtype=np.uint8)
        pixels[:] = GROUNDS[scene.ground]
        for group, sizes in zip(scene.groups, extents, strict=True):
            for box, extent in zip(group.boxes, sizes, strict=True):
                lay_on(pixels, self.stamp(group.drawing, extent), box.left, box.top)
        return pixels


def make_sample(
    index: int, world: tuple[Drawing, ...], painter: Painter, image_format: ImageFormat, seed: int
) -> Sample:
    """Make sample number `index` of the world's scenes for this seed."""
    random = Random(f"scene/{seed}/{index}")
    scene, extents = draw_scene(world, painter, random)
    said = caption(scene)
    annotation = {
        "ground": scene.ground,
        "objects": [
            {
                "name": group.drawing.name,
                "category": group.drawing.category,
                "colour": group.drawing.colour,
                "code_points": group.drawing.code,
                "count": group.num_copies,
                "boxes": group.boxes,
            }
            for group in scene.groups
        ],
        "relations": [fact._asdict() for fact in facts(scene)],
        "questions": [question._asdict() for question in questions(scene, world, random)],
        "statements": [statement._asdict() for statement in statements(scene, world, random)],
    }
    return Sample(
        key=f"scene-{seed}-{index:08d}",
        identity=canonical_json([said, [group.boxes for group in scene.groups]]),
        image=encode(painter.paint(scene, extents), image_format),
        image_format=image_format,
        caption=said,
        annotation=canonical_json(annotation),
    )


def draw_scene(
    world: tuple[Drawing, ...], painter: Painter, random: Random
) -> tuple[Scene, tuple[tuple[int, ...], ...]]:
    """Choose ground, groups, sizes and places; return the scene and the stamp size of every box, by group."""
    num_drawings = random.choice((1, 2, 2, 3, 3, 4, 4, 4))
    counts = _group_counts(num_drawings, random)
    chosen = random.sample(world, len(counts))
    cells = _cells(num_drawings, painter.image_size, random)
    groups, extents, taken = [], [], 0
    for drawing, count in zip(chosen, counts, strict=True):
        boxes, sizes = [], []
        for cell in cells[taken : taken + count]:
            room = min(cell.right - cell.left, cell.bottom - cell.top)
            extent = round(room * random.choice((0.7, 0.8, 0.9)))
            height, width = painter.stamp(drawing, extent).shape[:2]
            left = cell.left + random.randint(0, cell.right - cell.left - width)
            top = cell.top + random.randint(0, cell.bottom - cell.top - height)
            boxes.append(Box(left, top, left + width, top + height))
            sizes.append(extent)
        groups.append(Group(drawing, tuple(boxes)))
        extents.append(tuple(sizes))
        taken += count
    return Scene(random.choice(tuple(GROUNDS)), tuple(groups)), tuple(extents)


def _group_counts(num_drawings: int, random: Random) -> tuple[int, ...]:
    """Divide the drawings into groups of one to three."""
    parts = {
        1: ((1,),),
        2: ((1, 1), (1, 1), (2,)),
        3: ((1, 1, 1), (1, 2), (2, 1), (3,)),
        4: ((1, 1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2), (1, 3), (3, 1)),
    }
    return random.choice(parts[num_drawings])


def _cells(num_drawings: int, size: int, random: Random) -> list[Box]:
    """Return a cell for each drawing; consecutive cells touch, so copies of a drawing are neighbours."""
    half = size // 2
    if num_drawings == 1:
        side = random.randint(half, round(size * 0.9))
        left, top = random.randint(0, size - side), random.randint(0, size - side)
        return [Box(left, top, left + side, top + side)]
    if num_drawings == 2:
        offset = random.randint(0, size - half)
        if random.random() < 0.5:
            pair = [Box(0, offset, half, offset + half), Box(half, size - half - offset, size, size - offset)]
        else:
            pair = [Box(offset, 0, offset + half, half), Box(size - half - offset, half, size - offset, size)]
        return pair if random.random() < 0.5 else pair[::-1]
    # the four quarters as a ring, from a random start in a random direction
    ring = [
        Box(0, 0, half, half),
        Box(half, 0, size, half),
        Box(half, half, size, size),
        Box(0, half, half, size),
    ]
    start = random.randrange(4)
    walked = ring[start:] + ring[:start]
    return (walked if random.random() < 0.5 else walked[::-1])[:num_drawings]


@cache
def _measure_filled_share(code: str) -> float:
    """Return the longer side of the painted part over the side of OpenMoji's square."""
    size = 144
    height, width = _cut_tight(rasterise(code, size)).shape[:2]
    return max(height, width) / size


def _cut_tight(drawing_YXA: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = np.nonzero(drawing_YXA[..., 3] >= MIN_ALPHA)
    return drawing_YXA[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
