"""What can be wrong with data, by cause: one word each in the log, in the state of a loader and in a check's report."""

from typing import Literal, NamedTuple, get_args

from lightning_moevlm.common.errors import UserError

Cause = Literal[
    "shard_missing",  # no such file or object
    "shard_unreachable",  # its storage did not answer, after all retries
    "shard_truncated",  # fewer bytes than the manifest says, or a tar that ends within a member
    "shard_altered",  # another sha256, or more bytes, than the manifest says
    "shard_corrupt",  # no tar from some byte on
    "sample_count",  # a whole tar with fewer samples than the manifest says
    "duplicate_key",  # a second sample of the same key within a shard
    "member_missing",  # a sample without an image or text that its set promises
    "image_undecodable",  # no image of the format that its extension names
    "image_too_large",  # more pixels than allowed: a decompression bomb, or a mistake
    "text_not_utf8",
    "caption_empty",
    "json_malformed",  # a json member that captions or answers are read from
    "answer_missing",
]
MAX_PIXELS = 2**26
"""Of an image: 67 million, 192 MiB decoded; more than cameras have, less than a bomb."""
MAX_SIDE = 65_500
"""Of an image, in pixels: libjpeg reads and writes no longer ones."""

CAUSES: tuple[Cause, ...] = get_args(Cause)


class Lost(NamedTuple):
    """Samples that cannot be used. num_samples: how many, all for one cause. message: what, where and what to do."""

    num_samples: int
    cause: Cause
    message: str


class SampleFault(Exception):  # noqa: N818 - the data are at fault
    """A sample that cannot be used; whoever iterates over samples turns it into a `Lost` of one."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def decode_fault(cause: Cause, where: str, error: ValueError) -> SampleFault:
    """Return the fault of a member that cannot be decoded. where: which it is, and in which shard."""
    return SampleFault(cause, f"{where} cannot be decoded ({error}); rebuild the set without it")


def lost_sample_error(lost: Lost) -> UserError:
    """Return the error that ends a run which tolerates no loss."""
    return UserError(
        f"{lost.message} (or set data.max_lost_fraction to the share of samples that a run may do without)"
    )


def lost_batch_error(num_samples: int, last_error: str) -> UserError:
    """Return the error for an evaluation batch without a sample left: ranks must evaluate equally many batches."""
    return UserError(
        f"an evaluation batch lost all of its {num_samples} samples: {last_error} (or set a larger data.batch_size)"
    )


class ShardFault(UserError):  # noqa: N818 - the data are at fault
    """A shard of which nothing can be used; whoever reads it turns it into a `Lost` of all its samples."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
