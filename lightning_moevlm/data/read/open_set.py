"""Opens the set of a source, and chooses the members to read and the tokenizer of its texts."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Manifest, check_shard_size
from lightning_moevlm.data.images.decode import IMAGE_EXTENSIONS, SECOND_IMAGES
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.annotations import ANSWERS, Annotation
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION, find_captions
from lightning_moevlm.data.text.chat import ChatMaker
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer, read_tokenizer

_HASHED_BEFOREHAND_BYTES = 256 * 2**20
_NEEDED = {"pair": ("image", "text"), "image": ("image",), "text": ("text",)}


class OpenSet(NamedTuple):
    """The set of a source."""

    storage: ShardStorage
    manifest: Manifest
    members: tuple[str, ...]  # extensions of the members to read
    annotation: str | None = None  # as `data.annotation`
    second_image: str | None = None  # as `data.second_image`

    @property
    def has_texts(self) -> bool:
        """Whether texts are read."""
        return find_captions(self.members, self.manifest.layout.caption_field) is not None

    @property
    def gives_pairs(self) -> bool:
        """Whether samples are read as pairs."""
        return self.has_texts and any(extension in self.members for extension in IMAGE_EXTENSIONS)

    @property
    def metric_name(self) -> str:
        """The set's name, with the characters of metric keys."""
        return re.sub(r"[^\w.-]", "_", self.manifest.name)


def open_set(
    source: Source, storage: ShardStorage, annotation: str | None = None, second_image: str | None = None
) -> OpenSet:
    """Read the manifest of a source's set in `storage`, and choose its members.

    annotation, second_image: those of the data, for a source that names none.

    Raises:
        UserError: if there is no set (with the command that builds one), its manifest is broken, or it lacks the
            modality of the source.
    """
    manifest = storage.read_manifest()
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in manifest.members), None)
    captions = find_captions(manifest.members, manifest.layout.caption_field)
    there = {"image": image, "text": None if captions is None else captions.member}
    wanted = there.keys() if source.modality is None else _NEEDED[source.modality]
    lacking = [kind for kind in wanted if there[kind] is None]
    if source.modality is not None and lacking:
        raise UserError(
            f"source {storage} has modality {source.modality!r}, but its samples have no {' and no '.join(lacking)}: "
            f"they have {', '.join(manifest.members)}; choose another modality or another set"
        )
    members = tuple(member for kind in wanted if (member := there[kind]) is not None)
    return OpenSet(storage, manifest, members, source.annotation or annotation, source.second_image or second_image)


def find_annotation(opened: OpenSet, appends_answers: bool = False) -> Annotation | None:
    """Return what is read beside images and texts; answers may follow their questions, `data.append_answer`.

    Raises:
        UserError: if samples of the set lack its member.
    """
    if opened.annotation is None:
        return None
    annotation = Annotation(opened.annotation, appends_answers and opened.annotation == ANSWERS)
    if annotation.member == ANNOTATION_EXTENSION and ANNOTATION_EXTENSION not in opened.manifest.members:
        raise UserError(
            f"the annotation of {opened.storage} is {opened.annotation}, but its samples have no json member; "
            f"{annotation.remedy}"
        )
    return annotation


def find_second_image(opened: OpenSet) -> str | None:
    """Return the member with the second image of each sample.

    Raises:
        UserError: if samples of the set have one image.
    """
    name = opened.second_image
    if name is None:
        return None
    members = opened.manifest.members
    found = next((member for member in SECOND_IMAGES if member.startswith(f"{name}.") and member in members), None)
    if found is None:
        raise UserError(
            f"second_image of {opened.storage} is {name}, but its samples have one image: they have "
            f"{', '.join(members)}; make a set of statements about two images with `moevlm data convert statements` or "
            "`nlvr2`, or set second_image to null"
        )
    return found


def choose_tokenizer(sets: Sequence[OpenSet], file: str | None, vocab_size: int) -> CaptionTokenizer:
    """Read a user's tokenizer, else that of the first set with texts.

    Raises:
        UserError: if it is missing, altered, or has more ids than the model's `vocab_size` and texts are read.
    """
    if file is not None:
        tokenizer = read_tokenizer(file)
        added = f" ({', '.join(tokenizer.control.lacking)} included)" if tokenizer.control.lacking else ""
        refuse_more_ids(
            f"data.tokenizer {file}", f"{tokenizer.vocab_size} ids{added}", tokenizer.vocab_size, vocab_size
        )
        return tokenizer
    opened = next((one for one in sets if one.has_texts), sets[0])
    entry = opened.manifest.tokenizer
    remedy = ", or build the set with a smaller --vocab_size"
    what = f"the tokenizer of {opened.storage}"
    if opened.has_texts:
        refuse_more_ids(what, f"{entry.vocab_size} ids", entry.vocab_size, vocab_size, remedy)
    return opened.storage.read_tokenizer(entry)


def refuse_more_ids(what: str, ids: str, num_ids: int, vocab_size: int, remedy: str = "") -> None:
    """Refuse a tokenizer with more ids than the model embeds."""
    if num_ids > vocab_size:
        raise UserError(f"{what} has {ids}, data.vocab_size is {vocab_size}; raise it to {num_ids} or more{remedy}")


def digest_sets(sets: Mapping[str, OpenSet], tokenizer: CaptionTokenizer | None, chats: ChatMaker | None = None) -> str:
    """Return a hash of the exact data: a set's digest; of a mixture, of the sources' names, digests and members read.

    tokenizer, chats: those that are not the sets' own, which then count too.
    """
    digest = next(iter(sets.values())).manifest.digest
    if len(sets) > 1:
        parts = [[name, opened.manifest.digest, *opened.members] for name, opened in sets.items()]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    for foreign in ([tokenizer.to_json()] if tokenizer else []) + ([chats.digest] if chats else []):
        digest = hashlib.sha256(f"{digest}\n{foreign}".encode()).hexdigest()
    return digest


def refuse_other_than_jpegs(opened: OpenSet) -> None:
    """Refuse images that the device cannot decode.

    Raises:
        UserError: the set has others than JPEGs.
    """
    others = [name for name in IMAGE_EXTENSIONS if name != "jpg" and name in opened.members]
    if others:
        kinds = "PNG images" if others == ["png"] else "images of several formats"
        raise UserError(
            f"data.decode is device, but {opened.storage} has {kinds}, and the device decodes JPEGs only; "
            "set data.decode cpu, or build or convert the set with --image_format jpg"
        )


def check_local_shards(opened: OpenSet) -> None:
    """Hash the shards of a small set, and check the sizes of a large one's; do nothing if they are on a server.

    Raises:
        ShardFault: a shard is missing or differs from the manifest.
    """
    shards = [shard for split in opened.manifest.splits.values() for shard in split]
    folder = opened.storage.home_of(shards[0]).folder if shards else None
    if folder is None:
        return
    small = sum(shard.num_bytes for shard in shards) <= _HASHED_BEFOREHAND_BYTES
    for shard in shards:
        if small:
            opened.storage.local_path(shard)
        else:
            check_shard_size(folder, shard)
