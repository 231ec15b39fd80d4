"""Makes statements about pairs of scenes as rows: true or false, a sample each, with copies of both images.

The json member of the other set holds the scene graph, as in `scenes`: `ground`, and `objects` with `name` and `count`.
Both images of a pair come from the same split. The new samples' json says `answers` (true or false), the `kind` of
statement and the keys of both `samples`.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, Row, check_key
from lightning_moevlm.data.write.convert.sources.sets.set_source import SetSample, SetSource
from lightning_moevlm.data.write.demo.drawing_catalogue import DRAWINGS
from lightning_moevlm.data.write.demo.pair_statements import Content, pair_statements

_DRAWING = {drawing.name: drawing for drawing in DRAWINGS}


class _Object(msgspec.Struct):
    name: str
    count: int


class _Graph(msgspec.Struct):
    ground: str
    objects: tuple[_Object, ...]


class SetStatements(SetSource):
    """Statements about pairs of samples of a set of scenes in a folder.

    Args:
        folder: Folder of the set.
        name: Name of the new set.
        per_image: Statements for each image of a split, on average.
        seed: Other seeds give other pairs and texts.
    """

    def __init__(self, folder: Path, name: str | None, per_image: float, seed: int) -> None:
        check_number("per_image", per_image, above=0)
        super().__init__(folder, name, "statements", {"per_image": per_image, "seed": seed})
        self.per_image = per_image
        self.seed = seed

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the statements of all splits.

        Raises:
            UserError: a split has too few scenes for two that differ as a statement demands.
        """
        scenes: dict[str, list[tuple[SetSample, Content]]] = {}
        for sample in self.samples():
            content = sample if isinstance(sample, BadRow) else _read_content(sample)
            if isinstance(sample, BadRow) or isinstance(content, BadRow):
                assert isinstance(content, BadRow)
                yield content
            else:
                scenes.setdefault(sample.split, []).append((sample, content))
        for split, found in scenes.items():
            number = max(2, round(self.per_image * len(found)))
            try:
                made = list(pair_statements([content for _, content in found], number, f"{self.seed}/{split}"))
            except ValueError as error:
                raise UserError(
                    f"the {split} split of {self.folder}: {error}; build the set with more samples"
                ) from None
            for index, statement in enumerate(made):
                left, right = found[statement.left][0], found[statement.right][0]
                yield Row(
                    place=f"{left.place} and {right.place}",
                    key=check_key(f"{self.name}-{split}-{index:08d}"),
                    image=left.image,
                    caption=statement.text,
                    annotation={
                        "kind": statement.kind,
                        "answers": [str(statement.truth).lower()],
                        "samples": [left.key, right.key],
                    },
                    split=left.split,
                    second_image=right.image,
                )


def _read_content(sample: SetSample) -> Content | BadRow:
    try:
        graph = msgspec.json.decode(sample.annotation, type=_Graph)
        counts = {_DRAWING[each.name]: each.count for each in graph.objects}
    except msgspec.MsgspecError as error:
        return BadRow(sample.place, "row_malformed", f"its json holds no scene graph ({error})")
    except KeyError as error:
        return BadRow(sample.place, "row_malformed", f"its json names {error}, which scenes do not show")
    if sample.image is None:
        return BadRow(sample.place, "member_missing", "this sample has no image")
    return Content(graph.ground, counts)
