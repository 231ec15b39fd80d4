"""A set's manifest: everything that can be known about its shards without opening them.

`manifest.json` lies beside the shards and says which files each split has, how many samples and bytes they
hold and what they hash to, under which licence the set stands and with which arguments it was built.
Readers trust nothing else: a shard that is not what its manifest says is refused. The manifest's `digest`
names the exact data of a run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.layout import PLAIN, Layout

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_WITH_LAYOUT = "moevlm-shards/1", "moevlm-shards/2"

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Scalar = str | int | float | bool
OTHER_SPELLINGS = {"jpeg": "jpg"}
"""Of extensions in tars: what they mean in a manifest, and wherever samples are spoken of."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: its name in the set, its samples, its size in bytes, the sha256 of its bytes in hex."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerEntry:
    """The set's tokenizer file, the sha256 of its bytes in hex, and the number of ids."""

    file: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """What a set holds.

    image_size: pixels per side of the stored pictures; where they differ, a size that half of them reach; 0 without
    pictures. members: file extensions that every sample has.
    build: the arguments it was built with. sources: versions of the packages its pictures come from. layout: where
    members lie in the tars.
    """

    name: str
    version: int
    licence: str
    licence_url: str
    attribution: str
    image_size: int
    members: tuple[str, ...]
    build: dict[str, Scalar]
    sources: dict[str, str]
    tokenizer: TokenizerEntry
    splits: dict[Split, tuple[ShardEntry, ...]]
    layout: Layout = PLAIN

    @property
    def digest(self) -> str:
        """Sha256, in hex, of the canonical form (sorted keys, no blanks)."""
        canonical = json.dumps(self._as_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def num_samples(self, split: Split) -> int:
        """Samples of one split."""
        return sum(shard.num_samples for shard in self.splits[split])

    def write(self, root: Path) -> None:
        """Write `manifest.json` into `root`, whole or not at all."""
        unfinished = root / f".{MANIFEST_FILE}.unfinished"
        unfinished.write_text(json.dumps(self._as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(root / MANIFEST_FILE)

    def _as_json(self) -> dict[str, object]:
        content = {"format": FORMAT if self.layout == PLAIN else FORMAT_WITH_LAYOUT, **asdict(self)}
        if self.layout == PLAIN:
            del content["layout"]  # as it always was, so that digests stay
        return content


def read_manifest(root: Path) -> Manifest:
    """Read and validate `root/manifest.json`.

    Raises:
        UserError: if it is missing, is not JSON (with the line), or a field is missing or of the wrong kind.

    """
    path = root / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise no_set(root) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the folder and its files to this user"
        ) from None


def no_set(root: Path) -> UserError:
    """Return the error for a place without `manifest.json`: what is there instead, and which command makes a set."""
    if any(mark in str(root) for mark in "{*?") or root.suffix == ".tar":
        return UserError(
            f"{root} does not name a set: give the folder of its shards, which holds a {MANIFEST_FILE} too"
        )
    recipe = "openmoji" if "openmoji" in root.name else "scenes"
    build = f"`moevlm data build {recipe} --out {root}`"
    if not root.exists():
        return UserError(f"there is no set of shards in {root}, and no such folder; build one with {build}")
    if not root.is_dir():
        return UserError(f"{root} is a file; give the folder of a set of shards")
    if any(root.glob("*.tar")):
        return UserError(
            f"{root} holds tars, but no {MANIFEST_FILE} that says what is in them; make one beside them, which leaves "
            f"them as they are, with `moevlm data convert img2dataset {root} --out {root} --licence LICENCE`"
        )
    return UserError(
        f"there is no set of shards in {root}; build one with {build}, or make one of your own data with `moevlm data "
        "convert`"
    )


def parse_manifest(data: bytes, place: str) -> Manifest:
    """Validate the bytes of a manifest that came from `place`, which is named in complaints.

    Raises:
        UserError: if they are not JSON (with the line), or a field is missing or of the wrong kind.

    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place} is not JSON ({where}); restore it or rebuild the set with --force true") from None
    return _Fields(content, place, "").manifest()


def check_shard_size(root: Path, shard: ShardEntry) -> Path:
    """Return the shard's path if it exists with the size that the manifest says (one `stat`, no reading).

    Raises:
        ShardFault: if it is missing or has another size.

    """
    path = root / shard.file
    if not path.is_file():
        raise ShardFault("shard_missing", f"shard {path} is missing; restore it or rebuild the set with --force true")
    check_size(path.stat().st_size, shard, str(path))
    return path


def check_size(num_bytes: int, shard: ShardEntry, place: str) -> None:
    """Compare a size with the manifest's; `place` names the shard in the complaint.

    Raises:
        ShardFault: if it differs.

    """
    if num_bytes != shard.num_bytes:
        short = num_bytes < shard.num_bytes
        raise ShardFault(
            "shard_truncated" if short else "shard_altered",
            f"shard {place} is {'truncated' if short else 'longer than it should be'}: {num_bytes} bytes, "
            f"its manifest says {shard.num_bytes}; restore it or rebuild the set with --force true",
        )


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(root: Path, shard: ShardEntry) -> Path:
    """Return the shard's path if its size and its sha256 are those of the manifest (reads the file once).

    Raises:
        ShardFault: if it is missing, or size or hash differ.

    """
    path = check_shard_size(root, shard)
    check_sha256(file_sha256(path), shard, str(path))
    return path


def check_sha256(found: str, shard: ShardEntry, place: str) -> None:
    """Compare a hash with the manifest's; `place` names the shard in the complaint.

    Raises:
        ShardFault: if it differs.

    """
    if found != shard.sha256:
        raise ShardFault(
            "shard_altered",
            f"shard {place} is not the one its manifest names: sha256 {found[:12]}..., "
            f"expected {shard.sha256[:12]}...; restore it or rebuild the set with --force true",
        )


class _Fields:
    """A JSON object being read field by field; complaints name the file and the field."""

    def __init__(self, content: object, file: str, place: str) -> None:
        self._file = file
        self._place = place
        if not isinstance(content, dict):
            raise UserError(f"{file}: {place or 'the whole file'} must be an object, not {type(content).__name__}")
        self._content = content

    def _name(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def _get(self, key: str, kind: type) -> object:
        if key not in self._content:
            raise UserError(f"{self._file}: field {self._name(key)!r} is missing; rebuild the set with --force true")
        value = self._content[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(
                f"{self._file}: field {self._name(key)!r} must be {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def text(self, key: str) -> str:
        value = self._get(key, str)
        assert isinstance(value, str)
        return value

    def count(self, key: str) -> int:
        value = self._get(key, int)
        assert isinstance(value, int)
        if value < 0:
            raise UserError(f"{self._file}: field {self._name(key)!r} must not be negative, got {value}")
        return value

    def file(self, key: str) -> str:
        value = self.text(key)
        # a name with a slash or a scheme could make a reader open, or run, something outside the set
        if value in ("", ".", "..") or any(mark in value for mark in ("/", "\\", ":", "\0")):
            raise UserError(f"{self._file}: {self._name(key)!r} must be a file name inside the set, got {value!r}")
        return value

    def inner(self, key: str) -> "_Fields":
        return _Fields(self._get(key, dict), self._file, self._name(key))

    def items(self, key: str) -> list["_Fields"]:
        values = self._get(key, list)
        assert isinstance(values, list)
        return [_Fields(value, self._file, f"{self._name(key)}[{i}]") for i, value in enumerate(values)]

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._get(key, list)
        assert isinstance(values, list)
        return tuple(str(value) for value in values)

    def scalars(self, key: str) -> dict[str, Scalar]:
        values = self._get(key, dict)
        assert isinstance(values, dict)
        for name, value in values.items():
            if not isinstance(value, str | int | float | bool):
                raise UserError(f"{self._file}: field {self._name(key)}.{name} must be a plain value, got {value!r}")
        return dict(values)

    def layout(self) -> Layout:
        stored_as = self.inner("stored_as")
        return Layout(
            {member: stored_as.texts(member) for member in stored_as._content},
            self.text("caption_field"),
            self._get("keys_repeat", bool) is True,
        )

    def manifest(self) -> Manifest:
        found = self.text("format")
        if found not in (FORMAT, FORMAT_WITH_LAYOUT):
            raise UserError(
                f"{self._file}: format {found!r} is not known, only {FORMAT!r} and {FORMAT_WITH_LAYOUT!r}; rebuild the "
                "set"
            )
        tokenizer, splits = self.inner("tokenizer"), self.inner("splits")
        return Manifest(
            name=self.text("name"),
            version=self.count("version"),
            licence=self.text("licence"),
            licence_url=self.text("licence_url"),
            attribution=self.text("attribution"),
            image_size=self.count("image_size"),
            members=self.texts("members"),
            build=self.scalars("build"),
            sources={name: str(value) for name, value in self.scalars("sources").items()},
            tokenizer=TokenizerEntry(tokenizer.file("file"), tokenizer.text("sha256"), tokenizer.count("vocab_size")),
            splits={split: tuple(entry.shard() for entry in splits.items(split)) for split in SPLITS},
            layout=PLAIN if found == FORMAT else self.inner("layout").layout(),
        )

    def shard(self) -> ShardEntry:
        return ShardEntry(self.file("file"), self.count("num_samples"), self.count("num_bytes"), self.text("sha256"))
