import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lightning_moevlm.common.atomic_files import fill_folder, write_atomically, write_folder
from lightning_moevlm.common.errors import UserError


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As root, a rename over /dev/null would make a file of it, for every program of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # so that nobody waits for anybody
    try:
        write_atomically(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_folder_is_refused_and_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be written \(Is a directory\)"):
        write_atomically(tmp_path, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    with pytest.raises(ZeroDivisionError), fill_folder(folder) as unfinished:
        (unfinished / "first").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with fill_folder(folder) as unfinished:
            (unfinished / text).write_text(text)
            (unfinished / "both").write_text(text)
    found = {file.name: file.read_text() for file in folder.iterdir()}
    assert found == {"old": "old", "new": "new", "both": "new"} and list(tmp_path.iterdir()) == [folder.parent]


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    for content in ("old", "new"):
        with write_folder(folder) as unfinished:
            (unfinished / "file").write_text(content)
    assert (folder / "file").read_text() == "new"
    full = pytest.raises(UserError, match=r"could not be written \(No space left on device")
    with full, write_folder(folder) as unfinished:
        (unfinished / "file").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for interruption in (KeyboardInterrupt, ValueError):
        with pytest.raises(interruption), write_folder(folder) as unfinished:
            raise interruption
    link.symlink_to(folder)
    with write_folder(link) as unfinished:
        (unfinished / "file").write_text("by the link")
    assert link.is_symlink()
    assert (folder / "file").read_text() == "by the link"
    assert {each.name for each in tmp_path.iterdir()} == {"folder", "link"}
