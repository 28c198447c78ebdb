"""A landing folder that is gone or damaged: one sentence, with the count and the first extract."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faletl import pipeline
from faletl.config import Settings
from faletl.landing.extracts import MANIFEST
from faletl.operations.verify import verify
from faletl.selection import Asked
from tests import truth
from tests.conftest import opened
from tests.integration.test_cli import faletl

USAGE = Asked(truth.day(21), truth.day(23), ["usage", "billing_events"])


@pytest.fixture
def loaded(settings: Settings) -> Settings:
    """Two days of two resources are loaded: four extracts."""
    assert pipeline.run(settings, USAGE).exit_code == 0
    return settings


def said(settings: Settings, folder: Path, *command: str) -> tuple[int, list[str]]:
    """The exit code of a command, and the lines on stderr that begin with the name of faletl."""
    done = faletl(*command, settings=settings, folder=folder)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("faletl: ")]


def remove_all(landed: Path) -> None:
    """The folder is gone, or its disk is not mounted."""
    shutil.rmtree(landed)


def damage_pages(landed: Path) -> None:
    """Every page holds something else."""
    for page in landed.rglob("*.json.zst"):
        page.write_bytes(b"other")


def damage_manifests(landed: Path) -> None:
    """No manifest can be read."""
    for manifest in landed.rglob(MANIFEST):
        manifest.write_bytes(b"{")


@pytest.mark.parametrize("damage", [remove_all, damage_pages, damage_manifests])
def test_verify_counts_damaged_extracts_in_one_sentence(
    damage: Callable[[Path], None], loaded: Settings
) -> None:
    damage(Path(loaded.landing))
    [sentence] = verify(loaded).findings
    assert "the landed pages of 4 extracts are damaged or gone" in sentence
    assert "check FALETL_LANDING" in sentence
    assert "The first: " in sentence
    assert "restore it, or fetch the window again with faletl run --start" in sentence


@pytest.mark.parametrize("damage", [damage_pages, damage_manifests])
def test_a_rebuild_counts_damaged_extracts_in_one_sentence(
    damage: Callable[[Path], None], loaded: Settings, tmp_path: Path
) -> None:
    damage(Path(loaded.landing))
    code, lines = said(loaded, tmp_path, "rebuild")
    assert code == 4
    assert len(lines) == 1
    assert "the landed pages of 4 extracts are damaged or gone" in lines[0]


@pytest.mark.parametrize("damage", [damage_pages, damage_manifests])
def test_a_load_counts_damaged_extracts_in_one_sentence(
    damage: Callable[[Path], None], settings: Settings, tmp_path: Path
) -> None:
    assert pipeline.extract(settings, USAGE).exit_code == 0
    damage(Path(settings.landing))
    code, lines = said(settings, tmp_path, "load")
    assert code == 4
    assert len(lines) == 1
    assert "the landed pages of 4 extracts are damaged or gone" in lines[0]


def test_a_single_damaged_extract_is_named_with_its_window(settings: Settings, tmp_path: Path) -> None:
    assert pipeline.extract(settings, USAGE).exit_code == 0
    damage_pages(Path(settings.landing) / "acme" / "usage" / "2026-11-22")
    code, lines = said(settings, tmp_path, "load")
    assert code == 4
    assert lines[0].startswith("faletl: usage, window 2026-11-22, page 1: the landed page ")
    with opened(settings) as connection:
        assert connection.execute("select count(*) from ops.loads").fetchall() == [(3,)]


@pytest.mark.parametrize("command", ["run", "load"])
def test_a_landing_folder_without_what_was_loaded_last_is_warned_about_once(
    command: str, loaded: Settings, tmp_path: Path
) -> None:
    """It may not be mounted; what lands goes there, and no other line repeats it."""
    remove_all(Path(loaded.landing))
    done = faletl(command, settings=loaded, folder=tmp_path)
    assert done.returncode == 0
    warned = [line for line in done.stderr.splitlines() if "lacks the pages of the newest load" in line]
    assert len(warned) == 1
    assert "check that FALETL_LANDING is right and its disk is mounted" in warned[0]
    if command == "run":
        again = faletl(command, settings=loaded, folder=tmp_path)
        assert "lacks the pages" not in again.stderr
