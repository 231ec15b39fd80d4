"""Fetches files of a set from a server through fsspec, with retries and resumed downloads.

Drivers raise different errors, so any error counts as "the storage did not answer". It is retried, unless the server
refused. The pause before retry n is drawn from [0, backoff * 2^n] ("full jitter"), so that many readers do not return
at once. Credentials never reach a message or a driver's log: neither the part of an address before @ nor its query,
which holds signatures. Keys and endpoints come from the environment, as each driver documents it (`AWS_*`,
`FSSPEC_S3_*`, `GOOGLE_APPLICATION_CREDENTIALS`).
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BufferedReader, RawIOBase
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec
from fsspec.asyn import sync
from fsspec.callbacks import Callback

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import MASK, mask_url_secrets
from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.manifest import ShardEntry, check_size
from lightning_moevlm.data.storage.stop_request import StoppedError, StopRequest

T = TypeVar("T")

HTTP = ("http", "https")
_EXTRAS = {"s3": "s3", "gs": "gs"}
_PIECE_BYTES = 8 * 2**20
_STREAMED_BYTES = 2**20
_LONGEST_PAUSE_S = 30.0
_SILENCE_S = 60
"""A server that sends nothing for so long counts as gone."""
_CANCEL_POLL_S = 0.1
"""A transfer ends at most so long after a request to stop, even if its server is silent."""
_TRY_AGAIN = (408, 425, 429)
_chance = random.SystemRandom()  # not one of the generators that a run seeds


@dataclass(frozen=True)
class RemoteFolder:
    """A folder on a server."""

    url: str = field(repr=False)
    attempts: int  # tries in a row without progress until the server counts as unreachable
    backoff_s: float  # longest first pause, seconds

    @property
    def protocol(self) -> str:
        """The scheme of the URL."""
        return urlsplit(self.url).scheme.lower()

    def place(self, file: str = "") -> str:
        """Return the address of a file without credentials."""
        parts = urlsplit(self.url)
        path = "/".join((parts.path.rstrip("/"), file)) if file else parts.path
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))

    def read(self, file: str) -> bytes:
        """Return a small file.

        Raises:
            ShardFault: if it is missing or its storage does not answer.
        """
        system, path = self._open_system(file)
        return self._try(file, lambda: bytes(system.cat_file(path)), lambda: 0, StopRequest())

    def files(self, pattern: str) -> list[str]:
        """Return the names of the folder's files that match a pattern, sorted.

        Raises:
            ShardFault: if the folder is missing, its storage does not answer, or does not list it.
        """
        system, path = self._open_system("")
        listed = self._try("", lambda: system.ls(path, detail=False), lambda: 0, StopRequest())
        names = (unquote(urlsplit(str(each)).path.rpartition("/")[2]) for each in listed)
        return sorted({name for name in names if fnmatchcase(name, pattern) and not name.startswith(".")})

    def stream(self, file: str) -> BinaryIO:
        """Open a file for reading from its beginning on; a broken transfer is resumed.

        Raises:
            ShardFault: if it is missing or its storage does not answer, here or at a later read.
        """
        stream = _Stream(self, file)
        stream.begin()
        return BufferedReader(stream, _STREAMED_BYTES)

    def download(self, entry: ShardEntry, out: BinaryIO, stop: StopRequest) -> None:
        """Write a shard to `out`, from its beginning; a broken download is resumed.

        Raises:
            ShardFault: if it is missing, its storage does not answer, or its size is not the manifest's.
            UserError: if `out` cannot be written.
            StoppedError: if asked to stop.
        """
        sink = _Sink(out, entry, self.place(entry.file))
        system, path = self._open_system(entry.file)
        if self.protocol in HTTP:
            self._try(entry.file, lambda: self._download_stream(system, path, sink, stop), lambda: sink.furthest, stop)
        else:
            size = self._try(entry.file, lambda: _call(system, "info", stop, path)["size"], lambda: 0, stop)
            check_size(size, entry, sink.place)
            self._try(entry.file, lambda: self._download_pieces(system, path, sink, stop), lambda: sink.furthest, stop)

    def _download_stream(self, system: Any, path: str, sink: "_Sink", stop: StopRequest) -> None:
        """Continue at the end of the sink; a server that ignores the range is read from the beginning."""
        if sink.tell() == sink.entry.num_bytes:
            return
        sink.expect_answer()
        headers = {**_HTTP_HEADERS}
        if sink.tell():
            headers["Range"] = f"bytes={sink.tell()}-"
        _call(system, "get_file", stop, path, sink, callback=sink.answer, headers=headers)
        sink.check_whole()

    def _download_pieces(self, system: Any, path: str, sink: "_Sink", stop: StopRequest) -> None:
        while sink.tell() < sink.entry.num_bytes:
            end = min(sink.tell() + _PIECE_BYTES, sink.entry.num_bytes)
            piece = _call(system, "cat_file", stop, path, start=sink.tell(), end=end)
            if not piece:
                break
            sink.write(piece)
        sink.check_whole()

    def _open_system(self, file: str) -> tuple[Any, str]:
        """Return fsspec's file system, which it keeps per process, and the file's path in it."""
        for logger in _DRIVERS:
            logging.getLogger(logger).addFilter(_URL_MASK)  # twice is once
        parts = urlsplit(self.url)
        name = quote(file) if self.protocol in HTTP else file
        url = urlunsplit(parts._replace(path="/".join((parts.path.rstrip("/"), name))))
        try:
            if self.protocol in HTTP:
                return fsspec.core.url_to_fs(url, client_kwargs={"timeout": _timeouts()})
            return fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = _EXTRAS.get(self.protocol)
            remedy = f"pip install 'lightning-moevlm[{extra}]'" if extra else "install it"
            raise UserError(f"data root {self.place()} needs a package that is missing ({error}); {remedy}") from None
        except ValueError as error:
            raise UserError(f"data root {self.place()} cannot be opened: {self._mask(str(error))}") from None

    def _try(self, file: str, action: Callable[[], T], progress: Callable[[], int], stop: StopRequest) -> T:
        failures, reached = 0, progress()
        while True:
            try:
                return action()
            except (UserError, StoppedError):
                raise
            except Exception as error:  # drivers raise anything
                where, why = self.place(file), self._mask(f"{type(error).__name__}: {error}")
                status = _status(error)
                if isinstance(error, FileNotFoundError) and status in (None, 404, 410):
                    raise ShardFault("shard_missing", f"{where} is missing; restore it or rebuild the set") from None
                failures = 1 if progress() > reached else failures + 1
                reached = progress()
                refused = _is_refusal(error, status)
                if refused or failures >= self.attempts:
                    times = "refused" if refused else f"did not answer {failures} times in a row"
                    raise ShardFault(
                        "shard_unreachable",
                        f"{where} {times} ({why}); check address, credentials in the environment, and network",
                    ) from None
            stop.pause(_chance.uniform(0, min(_LONGEST_PAUSE_S, self.backoff_s * 2**failures)))

    def _open_stream(self, file: str) -> Any:
        system, path = self._open_system(file)
        if self.protocol in HTTP:  # one answer, read as it comes: blocks need a server that knows ranges and sizes
            return system.open(path, "rb", block_size=0, size=1, headers=_HTTP_HEADERS)
        return system.open(path, "rb")

    def _mask(self, text: str) -> str:
        parts = urlsplit(self.url)
        for secret in (parts.netloc.rpartition("@")[0], parts.password, parts.query):
            text = text.replace(secret, MASK) if secret else text
        return mask_url_secrets(text)


class _UrlMask(logging.Filter):
    """Masks addresses in drivers' log records, their tracebacks included; some log them at the level DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask_url_secrets(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = mask_url_secrets(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


_DRIVERS = ("fsspec", "fsspec.http", "fsspec.asyn", "aiohttp.client", "aiohttp.internal", "asyncio", "s3fs", "gcsfs")
_URL_MASK = _UrlMask()

_HTTP_HEADERS = {"Accept-Encoding": "identity"}
"""A compressed transfer could unpack to any size, and could not be resumed."""


class _Stream(RawIOBase):
    """Reads a remote file in order. After a break it is opened again, and what was read is passed over."""

    def __init__(self, folder: RemoteFolder, file: str) -> None:
        self._folder = folder
        self._file = file
        self._source: Any = None
        self._position = 0

    def begin(self) -> None:
        """Open the file, so that a missing one is told at once."""
        self._retry(self._open)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._retry(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        super().close()

    def _retry(self, action: Callable[[], T]) -> T:
        return self._folder._try(self._file, action, lambda: self._position, StopRequest())

    def _open(self) -> None:
        source = self._folder._open_stream(self._file)
        left = self._position
        while left:
            passed = len(source.read(min(left, _STREAMED_BYTES)))
            if not passed:
                raise ConnectionError(f"the file has become shorter than {self._position} bytes")
            left -= passed
        self._source = source

    def _read(self, size: int) -> bytes:
        if self._source is None:
            self._open()
        try:
            data = bytes(self._source.read(size))
        except Exception:
            self._source = None
            raise
        self._position += len(data)
        return data


class _Sink:
    """Writes a file in order, never beyond its promised size; fsspec sees it as a file."""

    def __init__(self, out: BinaryIO, entry: ShardEntry, place: str) -> None:
        self._out = out
        self.entry = entry
        self.place = place
        self.furthest = 0
        self._at = 0
        self._unanswered = False
        self._lengthless = False
        self.answer = Callback()

    def expect_answer(self) -> None:
        """Prepare for a request: the announced number of bytes decides where they belong."""
        if self._lengthless:
            self._at = 0  # without sizes, the answer to a range looks like the whole file
        self.answer = Callback()
        self._unanswered = True

    def write(self, data: bytes) -> int:
        if self._unanswered:
            self._unanswered = False
            self._place_answer()
        if self._at + len(data) > self.entry.num_bytes:
            check_size(self._at + len(data), self.entry, self.place)
        try:
            self._out.seek(self._at)
            self._out.write(data)
        except OSError as error:
            raise UserError(
                f"the cache of shards cannot be written ({error}); "
                "free space, lower data.cache_gib or set data.cache_dir"
            ) from None
        self._at += len(data)
        self.furthest = max(self.furthest, self._at)
        return len(data)

    def _place_answer(self) -> None:
        size = self.answer.size
        self._lengthless = size is None
        if self._at and self._lengthless:
            raise ConnectionError("the server did not announce a size")
        if self._at and size == self.entry.num_bytes - self._at:
            return
        self._at = 0  # the range was ignored: this is the file from its beginning
        if size is not None:
            check_size(size, self.entry, self.place)

    def check_whole(self) -> None:
        if self._at < self.entry.num_bytes:
            raise ConnectionError(f"the connection ended after {self._at} of {self.entry.num_bytes} bytes")

    def tell(self) -> int:
        return self._at

    def read(self) -> bytes:
        raise NotImplementedError("write only")

    def close(self) -> None:
        pass


def _call(system: Any, method: str, stop: StopRequest, *arguments: Any, **options: Any) -> Any:
    """Call a driver; a request to stop cancels its transfer."""
    stop.check()
    if not system.async_impl:
        return getattr(system, method)(*arguments, **options)
    # fsspec's own `get_file` does the same, but cannot be interrupted while a server is silent
    return sync(system.loop, _run_transfer, getattr(system, f"_{method}")(*arguments, **options), stop)


async def _run_transfer(transfer: Coroutine[Any, Any, Any], stop: StopRequest) -> Any:
    task = asyncio.ensure_future(transfer)
    while not task.done():
        await asyncio.wait({task}, timeout=_CANCEL_POLL_S)
        if stop.is_set():
            task.cancel()
    if task.cancelled():
        raise StoppedError
    return task.result()


def _timeouts() -> Any:
    import aiohttp  # only where something is read from a web server

    # the default allows five minutes for the whole transfer, however fast it goes
    return aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error; 0 if there was no answer at all, None if nothing is known."""
    # fsspec turns every error of a first contact into FileNotFoundError; its cause is the real one
    for one in (error, error.__cause__):
        status = getattr(one, "status", None)  # aiohttp's; its `code` may be that of a broken transfer, always 400
        if isinstance(status, int):
            return status
    if isinstance(error.__cause__, OSError):
        return 0
    code = getattr(error, "code", None)  # gcsfs
    return code if isinstance(code, int) else None


def _is_refusal(error: Exception, status: int | None) -> bool:
    """Return whether a retry is useless: the server refused, or there are no credentials."""
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return True
    return status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
