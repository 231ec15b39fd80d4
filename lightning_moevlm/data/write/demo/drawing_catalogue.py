"""Lists the drawings in scenes: well known, easy to distinguish, and with one undisputed name.

Colours are those of most of the painted surface; a test compares them with the rendered pixels. A drawing without a
dominant colour has none, and no question asks for it. Rows are ordered so that the first N, for any N, mix all
categories.
"""

from typing import NamedTuple

from lightning_moevlm.common.errors import UserError


class Drawing(NamedTuple):
    """A drawing that scenes can show."""

    code: str  # OpenMoji's code points
    name: str
    plural: str
    category: str
    colour: str | None  # None without a dominant colour


def _row(code: str, name: str, category: str, colour: str | None, plural: str | None = None) -> Drawing:
    return Drawing(code, name, plural or f"{name}s", category, colour)


DRAWINGS: tuple[Drawing, ...] = (
    _row("1F34E", "red apple", "fruit", "red"),
    _row("1F431", "cat face", "animal", "orange"),
    _row("2B50", "star", "sky", "yellow"),
    _row("1F697", "red car", "vehicle", "red"),
    _row("1F332", "fir tree", "plant", "green"),
    _row("26BD", "football", "ball", "white"),
    _row("1F511", "key", "tool", "orange"),
    _row("2764", "heart", "treasure", "red"),
    _row("1F355", "slice of pizza", "snack", "yellow", "slices of pizza"),
    _row("1F955", "carrot", "vegetable", "orange"),
    _row("2602", "umbrella", "household", "purple"),
    _row("1F34C", "banana", "fruit", "yellow"),
    _row("1F438", "frog face", "animal", "green"),
    _row("2601", "cloud", "sky", "grey"),
    _row("1F68C", "bus", "vehicle", "red", "buses"),
    _row("1F335", "cactus", "plant", "green", "cacti"),
    _row("1F3C0", "basketball", "ball", "orange"),
    _row("2702", "pair of scissors", "tool", "red", "pairs of scissors"),
    _row("1F451", "crown", "treasure", "yellow"),
    _row("1F369", "doughnut", "snack", "yellow"),
    _row("1F345", "tomato", "vegetable", "red", "tomatoes"),
    _row("1F388", "balloon", "household", "red"),
    _row("1F347", "bunch of grapes", "fruit", "purple", "bunches of grapes"),
    _row("1F437", "pig face", "animal", "pink"),
    _row("2600", "sun", "sky", "yellow"),
    _row("1F680", "rocket", "vehicle", "red"),
    _row("1F33B", "sunflower", "plant", "yellow"),
    _row("1F3BE", "tennis ball", "ball", "yellow"),
    _row("1F528", "hammer", "tool", None),
    _row("1F48E", "diamond", "treasure", "blue"),
    _row("1F354", "hamburger", "snack", None),
    _row("1F346", "aubergine", "vegetable", "purple"),
    _row("1F514", "bell", "household", "yellow"),
    _row("1F350", "pear", "fruit", "green"),
    _row("1F41F", "fish", "animal", "blue", "fish"),
    _row("1F308", "rainbow", "sky", None),
    _row("1F681", "helicopter", "vehicle", "red"),
    _row("1F339", "rose", "plant", "red"),
    _row("26BE", "baseball", "ball", "white"),
    _row("270F", "pencil", "tool", "orange"),
    _row("1F48D", "ring", "treasure", "grey"),
    _row("1F36A", "cookie", "snack", "brown"),
    _row("1F966", "head of broccoli", "vegetable", "green", "heads of broccoli"),
    _row("1FA91", "chair", "household", "yellow"),
    _row("1F353", "strawberry", "fruit", "red", "strawberries"),
    _row("1F43B", "bear face", "animal", "brown"),
    _row("1F319", "crescent moon", "sky", "yellow"),
    _row("2708", "aeroplane", "vehicle", "grey"),
    _row("1F334", "palm tree", "plant", "green"),
    _row("1F9F2", "magnet", "tool", "red"),
    _row("1F3C6", "trophy", "treasure", "yellow", "trophies"),
    _row("1F9C1", "cupcake", "snack", "pink"),
    _row("1F4D5", "red book", "household", "red"),
    _row("1F34B", "lemon", "fruit", "yellow"),
    _row("1F98B", "butterfly", "animal", "blue", "butterflies"),
    _row("1F695", "taxi", "vehicle", "yellow"),
    _row("1F337", "tulip", "plant", "orange"),
    _row("2693", "anchor", "tool", "grey"),
    _row("1F9C0", "wedge of cheese", "snack", "yellow", "wedges of cheese"),
    _row("1F4D8", "blue book", "household", "blue"),
    _row("1F34F", "green apple", "fruit", "green"),
    _row("1F422", "turtle", "animal", "green"),
    _row("1F4A7", "drop of water", "sky", "blue", "drops of water"),
    _row("1F69C", "tractor", "vehicle", None),
    # the first 64 are the default
    _row("1F341", "maple leaf", "plant", "orange", "maple leaves"),
    _row("1F98A", "fox face", "animal", "orange"),
    _row("1FAD6", "teapot", "household", "grey"),
    _row("1F34D", "pineapple", "fruit", "brown"),
    _row("1F43C", "panda face", "animal", "white"),
    _row("1F699", "blue jeep", "vehicle", "blue"),
    _row("1F344", "mushroom", "plant", "red"),
    _row("1F3B8", "guitar", "household", "red"),
    _row("1F419", "octopus", "animal", "red", "octopuses"),
    _row("1F366", "ice cream", "snack", None),
    _row("1F418", "elephant", "animal", "grey"),
    _row("1F4D7", "green book", "household", "green"),
    _row("1F40C", "snail", "animal", "brown"),
    _row("1F34A", "tangerine", "fruit", None),
    _row("1F6B2", "bicycle", "vehicle", None),
    _row("1F433", "whale", "animal", "blue"),
    _row("1F4A1", "light bulb", "household", "yellow"),
    _row("1F980", "crab", "animal", "red"),
    _row("1F512", "padlock", "tool", "yellow"),
    _row("1F383", "pumpkin", "vegetable", "orange"),
)


def first_drawings(count: int) -> tuple[Drawing, ...]:
    """Return the first `count` drawings.

    Raises:
        UserError: if there are fewer, or `count` is so small that questions have no wrong answers.
    """
    if not 8 <= count <= len(DRAWINGS):
        raise UserError(f"num_drawings is {count}, allowed are 8 to {len(DRAWINGS)}")
    return DRAWINGS[:count]
