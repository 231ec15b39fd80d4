"""Names what can be wrong with data. Each cause is one word in logs, in loader states and in reports of checks."""

from typing import Literal, NamedTuple, get_args

from lightning_moevlm.common.errors import UserError

Cause = Literal[
    "shard_missing",  # no such file or object
    "shard_unreachable",  # its storage did not answer, after all retries
    "shard_truncated",  # fewer bytes than the manifest says, or a tar that ends within a member
    "shard_altered",  # another sha256, or more bytes, than the manifest says
    "shard_corrupt",  # not a valid tar from some byte on
    "sample_count",  # a whole tar with fewer samples than the manifest says
    "duplicate_key",  # a second sample of the same key within a shard
    "member_missing",  # a sample without an image or a text that its set promises
    "image_undecodable",  # not an image of the format that its extension names
    "image_too_large",  # more pixels than allowed: a decompression bomb, or a mistake
    "text_not_utf8",
    "caption_empty",
    "json_malformed",  # a json member that captions or answers are read from
    "answer_missing",
    "map_failed",  # a user's own function for samples
]
MAX_PIXELS = 2**26
"""Largest image: 67 million pixels, 192 MiB decoded. Cameras have fewer, decompression bombs more."""
MAX_SIDE = 65_500
"""Longest side of an image, in pixels: libjpeg neither reads nor writes longer ones."""

CAUSES: tuple[Cause, ...] = get_args(Cause)


class Lost(NamedTuple):
    """Samples that cannot be used, for one cause."""

    num_samples: int
    cause: Cause
    message: str  # what is wrong, where, and what to do


class DataFault(Exception):  # noqa: N818 - the data are at fault
    """Data that cannot be used, with the cause."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class SampleFault(DataFault):
    """A sample cannot be used; iterators over samples turn it into a `Lost` of one."""


class ShardFault(DataFault, UserError):  # noqa: N818 - the data are at fault
    """Nothing of a shard can be used; its reader turns it into a `Lost` of all its samples."""


def decode_fault(cause: Cause, where: str, error: ValueError) -> SampleFault:
    """Return the fault of a member that cannot be decoded. where: the member and its shard."""
    return SampleFault(cause, f"{where} cannot be decoded ({error}); rebuild the set without it")


def lost_sample_error(lost: Lost) -> UserError:
    """Return the error that ends a run without tolerance for losses."""
    return UserError(f"{lost.message} (or set data.max_lost_fraction to the fraction of samples that may be lost)")


def lost_batch_error(num_samples: int, last_error: str) -> UserError:
    """Return the error for an evaluation batch without a sample left: ranks must evaluate equally many batches."""
    return UserError(
        f"an evaluation batch lost all of its {num_samples} samples: {last_error} (or set a larger data.batch_size)"
    )
