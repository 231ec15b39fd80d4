"""Describes a set's shards, so that they need not be opened: the manifest.

`manifest.json` lies beside the shards. It lists the files of each split with their samples, bytes and hashes, the
licence, and the arguments that the set was built with. Readers refuse a shard that differs from its manifest. The
manifest's `digest` names the exact data of a run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.convert_record import convert_record
from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_WITH_LAYOUT, FORMAT_ELSEWHERE = "moevlm-shards/1", "moevlm-shards/2", "moevlm-shards/3"

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Scalar = str | int | float | bool
Count = Annotated[int, msgspec.Meta(ge=0)]
SPLIT = "split"
"""In `build`: the one split that a set has by intention; the others are empty."""
OTHER_SPELLINGS = {"jpeg": "jpg"}
"""Extensions in tars, and their spelling in manifests and messages."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a set."""

    file: str  # name in the set's folder
    num_samples: Count
    num_bytes: Count
    sha256: str  # of its bytes, in hex
    at: str = ""  # its folder or address, set by the manifest; "": beside the manifest

    def __post_init__(self) -> None:
        _check_file_name(self.file)


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer file of a set."""

    file: str  # name in the set's folder
    sha256: str  # of its bytes, in hex
    vocab_size: Count  # number of ids

    def __post_init__(self) -> None:
        _check_file_name(self.file)


def _check_file_name(name: str) -> None:
    # a name with a slash or a scheme could make a reader open, or run, something outside the set
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
        raise ValueError(f"'file' must be a file name inside the set, got {name!r}")


@dataclass(frozen=True)
class Manifest:
    """The content of a set."""

    name: str
    version: Count  # of the recipe that built it
    licence: str
    licence_url: str
    attribution: str  # the sentence that the licence requires
    image_size: Count  # pixels per side; if images differ, half of them reach it; 0 without images
    members: tuple[str, ...]  # file extensions that every sample has
    build: dict[str, Scalar]  # arguments that it was built with
    sources: dict[str, str]  # versions of the packages that its images come from
    tokenizer: TokenizerEntry
    splits: dict[Split, tuple[ShardEntry, ...]]
    layout: Layout = PLAIN_LAYOUT  # names of members in the tars
    shards_at: str = ""  # folder or address of the tars, if they are not beside the manifest

    @property
    def digest(self) -> str:
        """Hash of the content: sha256, in hex, of the canonical form (sorted keys, no blanks).

        The tars may be moved: their place does not count.
        """
        content = {name: value for name, value in self._as_json().items() if name != "shards_at"}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def num_samples(self, split: Split) -> int:
        """Return the number of samples of a split."""
        return sum(shard.num_samples for shard in self.splits[split])

    def write(self, root: Path) -> None:
        """Write `root/manifest.json`, whole or not at all."""
        unfinished = root / f".{MANIFEST_FILE}.unfinished"
        unfinished.write_text(json.dumps(self._as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(root / MANIFEST_FILE)

    def _as_json(self) -> dict[str, object]:
        is_plain = self.layout == PLAIN_LAYOUT and not self.shards_at
        known = FORMAT if is_plain else FORMAT_WITH_LAYOUT if not self.shards_at else FORMAT_ELSEWHERE
        content = {"format": known, **asdict(self)}
        for shards in content["splits"].values():
            for shard in shards:
                del shard["at"]
        if not self.shards_at:
            del content["shards_at"]  # as it always was, so that digests stay
        if is_plain:
            del content["layout"]
        return content


class MixedManifest(NamedTuple):
    """The name of a mixture."""

    name: str


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


class _Elsewhere(msgspec.Struct):
    shards_at: str


def read_manifest(root: Path) -> Manifest:
    """Read and validate `root/manifest.json`.

    Raises:
        UserError: if it is missing or is not JSON, or a field is missing or has the wrong type.
    """
    path = root / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise missing_set_error(root) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); let this user read the folder and its files"
        ) from None


def missing_set_error(root: Path) -> UserError:
    """Return the error for a place without `manifest.json`: its content, and the command that makes a set."""
    if any(mark in str(root) for mark in "{*?") or root.suffix == ".tar":
        return UserError(
            f"{root} is not the folder of a set: give the folder that holds its shards and {MANIFEST_FILE}, or name "
            "tars in data.urls"
        )
    recipe = "openmoji" if "openmoji" in root.name else "scenes"
    build = f"`moevlm data build {recipe} --out {root}`"
    if not root.exists():
        return UserError(f"there is no set of shards in {root}, and no such folder; build one with {build}")
    if not root.is_dir():
        return UserError(f"{root} is a file; give the folder of a set of shards")
    if any(root.glob("*.tar")):
        return UserError(
            f"{root} holds tars, but no {MANIFEST_FILE} that describes them. Make one beside them, and leave them "
            f"unchanged, with `moevlm data convert img2dataset {root} --out {root} --licence LICENCE`, or train "
            f"without one: --data.root null --data.urls {root}"
        )
    return UserError(
        f"there is no set of shards in {root}; build one with {build}, or make one of your own data with `moevlm data "
        "convert`"
    )


def parse_manifest(data: bytes, place: str) -> Manifest:
    """Decode the bytes of a manifest. place: their file or address, for messages.

    Raises:
        UserError: if they are not JSON (with the line), or a field is missing or has the wrong type.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place} is not JSON ({where}); restore it or rebuild the set with --force true") from None
    version = convert_record(content, _Version, place).format
    known = (FORMAT, FORMAT_WITH_LAYOUT, FORMAT_ELSEWHERE)
    if version not in known:
        raise UserError(f"{place}: format is {version!r}, but only {', '.join(known)} are known; rebuild the set")
    splits = convert_record(content, _Splits, place).splits  # a record, so that errors name the split
    layout = convert_record(content, _Layout, place).layout if version != FORMAT else PLAIN_LAYOUT
    shards_at = convert_record(content, _Elsewhere, place).shards_at if version == FORMAT_ELSEWHERE else ""
    if "://" in place and shards_at and ("://" not in shards_at or shards_at.lower().startswith("file:")):
        raise UserError(f"{place} names {shards_at!r}, a local folder, for its shards: index the tars by their address")
    about = {key: value for key, value in content.items() if key not in ("layout", "shards_at")}
    found = convert_record({**about, "splits": {}}, Manifest, place)
    shards = {split: tuple(replace(shard, at=shards_at) for shard in getattr(splits, split)) for split in SPLITS}
    return replace(found, splits=shards, layout=layout, shards_at=shards_at)


def check_shard_size(root: Path, shard: ShardEntry) -> Path:
    """Return the shard's path if its size is the manifest's (one `stat`, no reading).

    Raises:
        ShardFault: if it is missing or has another size.
    """
    path = root / shard.file
    if not path.is_file():
        raise ShardFault("shard_missing", f"shard {path} is missing; restore it or rebuild the set with --force true")
    check_size(path.stat().st_size, shard, str(path))
    return path


def check_size(num_bytes: int, shard: ShardEntry, place: str) -> None:
    """Compare a shard's size with the manifest. place: of the shard, for messages.

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
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(root: Path, shard: ShardEntry) -> Path:
    """Return the shard's path if size and sha256 are the manifest's (reads the file once).

    Raises:
        ShardFault: if it is missing, or size or hash differ.
    """
    path = check_shard_size(root, shard)
    check_sha256(file_sha256(path), shard, str(path))
    return path


def check_sha256(found: str, shard: ShardEntry, place: str) -> None:
    """Compare a shard's sha256 with the manifest. place: of the shard, for messages.

    Raises:
        ShardFault: if it differs.
    """
    if found != shard.sha256:
        raise ShardFault(
            "shard_altered",
            f"shard {place} is not the one of its manifest: sha256 {found[:12]}..., "
            f"expected {shard.sha256[:12]}...; restore it or rebuild the set with --force true",
        )
