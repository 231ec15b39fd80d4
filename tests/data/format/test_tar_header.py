"""The fast path agrees with `tarfile` on every header that it accepts, and leaves the others to it."""

import io
import random
import tarfile
from pathlib import Path

import pytest

from lightning_moevlm.data.format import tar_header
from lightning_moevlm.data.format.tar_header import parse_plain_header
from lightning_moevlm.data.format.tar_members import Member, TarBreak, tar_members


def _header(name: str, num_bytes: int = 5, kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = num_bytes, kind
    return info.tobuf(form)[-512:]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "folder/b.txt", "x" * 90 + "/" + "y" * 80, "umlaut-ä.txt"])
def test_name_and_size_are_those_of_tarfile(name: str, form: int) -> None:
    for num_bytes in (0, 1, 511, 512, 513, 8**11 - 1):
        block = _header(name, num_bytes, form=form)
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        assert parse_plain_header(block) == (info.name, info.size)


def test_padding_by_hand() -> None:
    # data are filled up to blocks of 512
    padded = {size: parse_plain_header(_header("a.jpg", size)).padded_bytes for size in (0, 1, 512, 513)}  # type: ignore[union-attr]
    assert padded == {0: 0, 1: 512, 512: 512, 513: 1024}


@pytest.mark.parametrize("block", [bytes(512), b"\xff" * 512, bytes(range(256)) * 2])
def test_the_sum_is_exact(block: bytes) -> None:
    assert tar_header._sum(block) == sum(block)


def test_all_else_is_left_to_tarfile() -> None:
    good = _header("a.jpg")
    assert parse_plain_header(good) is not None
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.CONTTYPE):
        assert parse_plain_header(_header("a.jpg", kind=kind)) is None
    assert (
        parse_plain_header(_header("old/", kind=tarfile.AREGTYPE)) is None
    )  # a directory before there was a type for it
    assert parse_plain_header(_header("a.jpg", 8**11, form=tarfile.GNU_FORMAT)) is None  # in base 256
    assert parse_plain_header(bytes(512)) is None
    assert parse_plain_header(good[:511]) is None
    assert parse_plain_header(good[:10] + b"!" + good[11:]) is None  # the checksum tells


def test_no_mutated_header_means_something_else_to_tarfile() -> None:
    chance = random.Random(0)
    agreed = 0
    for _ in range(2000):
        block = bytearray(_header("folder/a.jpg", chance.randrange(10**6)))
        for _ in range(chance.randrange(3)):
            block[chance.choice((*range(12), *range(124, 136), *range(148, 160), *range(345, 350)))] = chance.choice(
                b"\0 01789/-+_x\x80\xff"
            )
        if chance.random() < 0.8:  # else the checksum gives it away
            total = sum(block) - sum(block[148:156]) + 8 * 32
            block[148:156] = b"%06o\0 " % total
        found = parse_plain_header(bytes(block))
        if found is not None:
            agreed += 1
            info = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
            assert info.isreg() and found == (info.name, info.size)
    assert agreed > 500


def _tar(members: list[tuple[str, bytes]], form: int, pax: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, pax_headers=pax) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if name.endswith("3.jpg"):
                tar.addfile(_directory())
    return out.getvalue()


def _directory() -> tarfile.TarInfo:
    info = tarfile.TarInfo("between")
    info.type = tarfile.DIRTYPE
    return info


def _walked(path: Path) -> list[Member]:
    with path.open("rb") as stream:
        return list(tar_members(stream, lambda name: not name.endswith("json")))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_fast_and_slow_give_the_same_members(form: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    long = "z" * 150 if form != tarfile.USTAR_FORMAT else "z" * 40  # an extended header before it
    names = [f"{stem}{i}.{end}" for i in range(5) for stem in ("a", f"{long}/") for end in ("jpg", "json", "txt")]
    path = tmp_path / "x.tar"
    path.write_bytes(_tar([(name, chance.randbytes(chance.randrange(2000))) for name in names], form))
    fast = _walked(path)
    assert [member.name for member in fast] == names
    monkeypatch.setattr("lightning_moevlm.data.format.tar_members.parse_plain_header", lambda block: None)
    assert _walked(path) == fast


def test_after_a_global_header_tarfile_reads_all(tmp_path: Path) -> None:
    # it gives every later member another name
    path = tmp_path / "x.tar"
    path.write_bytes(_tar([(f"{i}.txt", b"t") for i in range(3)], tarfile.PAX_FORMAT, pax={"path": "same.txt"}))
    assert [member.name for member in _walked(path)] == ["same.txt"] * 3


def test_a_truncated_tar_gives_the_same_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _tar([(f"{i}.txt", b"t" * 700) for i in range(4)], tarfile.USTAR_FORMAT)
    path = tmp_path / "x.tar"
    printed: list[list[tuple[str, str]]] = []
    for slow in (False, True):
        if slow:
            monkeypatch.setattr("lightning_moevlm.data.format.tar_members.parse_plain_header", lambda block: None)
        printed.append([])
        for length in range(1, len(whole), 97):
            path.write_bytes(whole[:length])
            try:
                ending = f"{len(_walked(path))} members"
            except TarBreak as error:
                ending = f"{error.cause}: {error}"
            printed[-1].append((str(length), ending))
    assert printed[0] == printed[1]
