"""Scratch folders are gone when their process is, however it ended."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from faletl.files import _delete_abandoned, scratch_folder
from tests.forked import fork, suffer


def die_in_one(parent: Path) -> None:
    """Be killed with something in a scratch folder."""
    tempfile.tempdir = str(parent)
    with scratch_folder() as folder:
        (folder / "rows.parquet").touch()
        suffer(signal.SIGKILL)


def test_what_a_killed_process_left_goes_with_the_next_and_what_is_held_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(2):
        assert fork(die_in_one, tmp_path).finish()[0] == -signal.SIGKILL
    [left] = tmp_path.iterdir()  # the second one had deleted that of the first
    about_to_be_held, never_held, of_others = (
        tmp_path / name for name in (".faletl-new-a", ".faletl-new-b", "faletl-demo")
    )
    for folder in (about_to_be_held, never_held, of_others):
        folder.mkdir()
    os.utime(never_held, (0, 0))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _delete_abandoned.cache_clear()
    stays = {about_to_be_held, of_others}
    with scratch_folder() as mine:
        assert set(tmp_path.iterdir()) == {mine, *stays}
        _delete_abandoned.cache_clear()
        with scratch_folder() as another:
            assert set(tmp_path.iterdir()) == {mine, another, *stays}
    assert set(tmp_path.iterdir()) == stays
    assert not left.exists()
