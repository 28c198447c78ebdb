"""Places on a disk: what a copy of a file is, whatever file systems it goes between."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from faletl.places import _CHUNK, copy_file


@pytest.mark.parametrize("size", [0, 1, 4096, 5 * 2**20 + 1, _CHUNK + 1])
def test_a_copy_is_the_file_and_stays_so_when_that_changes(size: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(size)
        file.seek(max(0, size - 3))
        file.write(b"end"[:size])
    content = source.read_bytes()
    target.write_bytes(b"of before, and longer than what comes")
    copy_file(source, target)
    with source.open("r+b") as file:
        file.write(b"another"[:size])
    assert target.read_bytes() == content


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system here")  # noqa: S108
def test_a_copy_goes_to_another_file_system(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * 2**20))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        copy_file(source, Path(other) / "target")
        assert (Path(other) / "target").read_bytes() == source.read_bytes()
        copy_file(Path(other) / "target", source)
        assert (Path(other) / "target").read_bytes() == source.read_bytes()


def test_a_copy_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "none", tmp_path / "target")
