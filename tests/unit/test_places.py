"""Places on a disk: what a copy of a file is, whatever file systems it goes between."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from faletl import files
from faletl.files import copy_file


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of several chunks."""
    monkeypatch.setattr(files, "_CHUNK_BYTES", 4096)
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3 * 4096 + 1))
    return path


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 3 * 4096])
def test_a_copy_is_the_file_and_stays_so_when_that_changes(size: int, source: Path) -> None:
    content, target = source.read_bytes()[:size], source.with_name("target")
    source.write_bytes(content)
    target.write_bytes(b"of before, and longer than what comes")
    copy_file(source, target)
    with source.open("r+b") as file:
        file.write(b"another"[:size])
    assert target.read_bytes() == content


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("number", [0, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSPC])
def test_what_the_system_does_not_copy_to_the_end_is_copied_by_us(
    chunks: int, number: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.copy_file_range, [None] * chunks

    def give_up(old: int, new: int, size: int) -> int:
        if left:
            left.pop()
            return real(old, new, size)
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(os, "copy_file_range", give_up)
    copy_file(source, source.with_name("target"))
    assert source.with_name("target").read_bytes() == source.read_bytes()


def test_a_python_that_cannot_ask_the_system_copies_by_itself(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    copy_file(source, source.with_name("target"))
    assert source.with_name("target").read_bytes() == source.read_bytes()


def test_a_copy_onto_a_link_to_the_file_leaves_the_file(source: Path) -> None:
    content, target = source.read_bytes(), source.with_name("target")
    target.symlink_to(source)
    copy_file(source, target)
    assert not target.is_symlink()
    assert source.read_bytes() == target.read_bytes() == content


def test_a_copy_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "none", tmp_path / "target")
