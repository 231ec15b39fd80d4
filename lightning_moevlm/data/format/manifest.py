"""A set's manifest: everything that can be known about its shards without opening them.

`manifest.json` lies beside the shards and says which files each split has, how many samples and bytes they
hold and what they hash to, under which licence the set stands and with which arguments it was built.
Readers trust nothing else: a shard that is not what its manifest says is refused. The manifest's `digest`
names the exact data of a run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.convert_record import convert_record
from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_WITH_LAYOUT = "moevlm-shards/1", "moevlm-shards/2"

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Scalar = str | int | float | bool
Count = Annotated[int, msgspec.Meta(ge=0)]
OTHER_SPELLINGS = {"jpeg": "jpg"}
"""Extensions in tars, and their spelling in manifests and messages."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a set.

    Attributes:
        file: Its name in the set's folder.
        num_samples: Samples in it.
        num_bytes: Its size.
        sha256: Hash of its bytes, in hex.

    """

    file: str
    num_samples: Count
    num_bytes: Count
    sha256: str

    def __post_init__(self) -> None:
        _check_file_name(self.file)


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer of a set.

    Attributes:
        file: Its name in the set's folder.
        sha256: Hash of its bytes, in hex.
        vocab_size: Number of ids.

    """

    file: str
    sha256: str
    vocab_size: Count

    def __post_init__(self) -> None:
        _check_file_name(self.file)


def _check_file_name(name: str) -> None:
    # a name with a slash or a scheme could make a reader open, or run, something outside the set
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
        raise ValueError(f"'file' must be a file name inside the set, got {name!r}")


@dataclass(frozen=True)
class Manifest:
    """The content of a set.

    Attributes:
        name: Name of the set.
        version: Version of the recipe that built it.
        licence: Name of its licence.
        licence_url: Address of the licence text.
        attribution: Sentence that the licence requires.
        image_size: Pixels per side of the images. If they differ, half of them reach this size. 0 without images.
        members: File extensions that every sample has.
        build: Arguments that it was built with.
        sources: Versions of the packages that its images come from.
        tokenizer: Its tokenizer file.
        splits: Shards by split.
        layout: Position of members in the tars.

    """

    name: str
    version: Count
    licence: str
    licence_url: str
    attribution: str
    image_size: Count
    members: tuple[str, ...]
    build: dict[str, Scalar]
    sources: dict[str, str]
    tokenizer: TokenizerEntry
    splits: dict[Split, tuple[ShardEntry, ...]]
    layout: Layout = PLAIN_LAYOUT

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
        content = {"format": FORMAT if self.layout == PLAIN_LAYOUT else FORMAT_WITH_LAYOUT, **asdict(self)}
        if self.layout == PLAIN_LAYOUT:
            del content["layout"]  # as it always was, so that digests stay
        return content


class _Version(msgspec.Struct):
    format: str


class _SplitShards(msgspec.Struct):
    train: tuple[ShardEntry, ...]
    val: tuple[ShardEntry, ...]
    test: tuple[ShardEntry, ...]


class _Splits(msgspec.Struct):
    splits: _SplitShards


class _Layout(msgspec.Struct):
    layout: Layout


def read_manifest(root: Path) -> Manifest:
    """Read and validate `root/manifest.json`.

    Raises:
        UserError: if it is missing, is not JSON (with the line), or a field is missing or of the wrong kind.

    """
    path = root / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise missing_set_error(root) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the folder and its files to this user"
        ) from None


def missing_set_error(root: Path) -> UserError:
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
    """Decode the bytes of a manifest.

    Args:
        data: The bytes.
        place: The file or address that they came from, for messages.

    Raises:
        UserError: if they are not JSON (with the line), or a field is missing or has the wrong type.

    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place} is not JSON ({where}); restore it or rebuild the set with --force true") from None
    version = convert_record(content, _Version, place).format
    if version not in (FORMAT, FORMAT_WITH_LAYOUT):
        raise UserError(
            f"{place}: format is {version!r}, but only {FORMAT!r} and {FORMAT_WITH_LAYOUT!r} are known; rebuild the set"
        )
    splits = convert_record(content, _Splits, place).splits  # a record, so that errors name the split
    layout = convert_record(content, _Layout, place).layout if version == FORMAT_WITH_LAYOUT else PLAIN_LAYOUT
    about = {key: value for key, value in content.items() if key != "layout"}
    found = convert_record({**about, "splits": {}}, Manifest, place)
    return replace(found, splits={split: getattr(splits, split) for split in SPLITS}, layout=layout)


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
