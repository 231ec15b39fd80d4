"""Decides which attempt at a run may begin, and records how it ended, in files that every machine of a cluster sees.

A job is submitted in two steps, and the program may be killed between them: the cluster has the job, and the ledger
does not know. So each attempt has a ticket that can be taken once: by the job as it begins, or by the next program. A
job that finds its ticket taken leaves. Two attempts never run.
"""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.study.run.processes.child_process import ProcessEnd

NO_OWNER = "no owner"


@dataclass(frozen=True)
class Tickets:
    """The tickets of a study, in a folder."""

    folder: Path

    def take(self, ticket: str, owner: str) -> str | None:
        """Take a ticket atomically; return None, or its earlier owner."""
        file = self._taken(ticket)
        mine = file.with_name(f".{ticket}.{uuid.uuid4().hex}")
        self.folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(owner, encoding="utf-8")
        try:
            os.link(mine, file)  # a link appears with its whole text or not at all
        except FileExistsError:
            return file.read_text(encoding="utf-8")
        finally:
            mine.unlink()
        return None

    def write_end(self, ticket: str, ended: ProcessEnd) -> None:
        """Write how an attempt ended."""
        write_atomically(self._ended(ticket), msgspec.json.encode(ended).decode() + "\n")

    def read_end(self, ticket: str) -> ProcessEnd | None:
        """Return how an attempt ended, or None while nothing has been written."""
        try:
            return msgspec.json.decode(self._ended(ticket).read_bytes(), type=ProcessEnd)
        except FileNotFoundError:
            return None

    def _taken(self, ticket: str) -> Path:
        return self.folder / f"{ticket}.taken"

    def _ended(self, ticket: str) -> Path:
        return self.folder / f"{ticket}.json"
