"""Tables that people write: what a build says of them before it takes them in, and after."""

from __future__ import annotations

import logging
from decimal import Decimal
from pathlib import Path

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.models import seeds
from tests.conftest import ask, opened

OWNERS = "account,credential_id,owner,team,cost_centre\n"
UNITS = "unit,canonical_unit,family,base_unit,factor\n"


@pytest.fixture
def built(clock: time_machine.Traveller, settings: Settings) -> Settings:
    """A warehouse that was built without tables of the user's own."""
    del clock
    assert pipeline.run(settings).exit_code == 0
    return settings


def given(settings: Settings, folder: Path, **tables: str) -> Settings:
    """The settings with these tables: their lines behind the head."""
    heads = {"owners": OWNERS, "units": UNITS}
    written: dict[str, object] = {}
    for name, lines in tables.items():
        path = folder / f"{name}.csv"
        path.write_text(heads[name] + lines, "utf-8")
        written[name] = path
    return settings.model_copy(update=written)


def warnings(caplog: pytest.LogCaptureFixture, setting: str) -> list[str]:
    """What was warned about of that setting since the last look."""
    found = [
        record.message
        for record in caplog.records
        if record.levelno == logging.WARNING and setting in record.message
    ]
    caplog.clear()
    return found


def test_lines_that_match_nothing_are_named_by_their_numbers_once(
    built: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = "".join(f",key:gone-{number},Ben,,\n" for number in range(4))
    mine = given(
        built,
        tmp_path,
        owners=f",key:key-1,Ann,,\nother,user:alice,Cem,,\n{odd}",
        units="IMAGES ,image,image,,\nmoon phases,moon phase,time,second,60\n",
    )
    caplog.clear()
    assert pipeline.run(mine).exit_code == 0
    assert warnings(caplog, "FALETL_OWNERS")[-1] == (
        "FALETL_OWNERS: 5 of 6 lines match no loaded credential: line 3, 'other user:alice'; "
        "line 4, 'key:gone-0'; line 5, 'key:gone-1'; and 2 more"
    )
    assert pipeline.run(mine).exit_code == 0
    assert warnings(caplog, "FALETL_OWNERS") == []  # nothing is new of it
    pipeline.build(mine, full=True)
    assert warnings(caplog, "FALETL_UNITS") == [
        "FALETL_UNITS: 1 of 2 lines match no loaded unit: line 3, 'moon phases'"
    ]


def test_a_line_for_a_unit_behind_a_number_matches(
    built: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = given(built, tmp_path, units="characters,letter,text,,\nimages,image,image,,\n")
    caplog.clear()
    pipeline.build(mine)
    assert not any("match no" in one for one in warnings(caplog, "FALETL_UNITS"))


def test_a_build_says_what_differs_from_the_last_one_before_it_replaces_anything(
    built: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f",key:key-{number},Ann,,\n" for number in range(1, 7)]
    pipeline.build(given(built, tmp_path, owners="".join(lines)))
    caplog.clear()
    other = given(
        built, tmp_path, owners=",key:key-1,Eve,,\n,none,web,,\n", units="images,pic,image,,\n"
    )
    other = other.model_copy(update={"runaway_factor": built.runaway_factor + 1})
    monkeypatch.setattr(seeds, "plant", broken)
    with pytest.raises(RuntimeError, match="not reached"):
        pipeline.build(other)
    assert warnings(caplog, "lines differ") == [
        "FALETL_UNITS: lines differ from those of the last build: 1 changed (images)",
        (
            "FALETL_OWNERS: lines differ from those of the last build: 1 new (none), 5 gone (key:key-2, "
            "key:key-3, key:key-4 and 2 more), 1 changed (key:key-1)"
        ),
        "FALETL_RUNAWAY_…: lines differ from those of the last build: 1 changed (runaway_factor)",
    ]
    with opened(built) as connection:
        owners = connection.execute("select distinct owner from marts.dim_credential").fetchall()
        assert sorted(owners) == [("Ann",), ("UNMAPPED",)]


def broken(*_: object) -> None:
    """Stand in for what replaces the tables."""
    raise RuntimeError("not reached")


def test_a_build_of_the_same_tables_says_nothing_of_them(
    built: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = given(
        built,
        tmp_path,
        owners=",key:key-1,Ann,,\n",
        units="images,image,image,image,1\nclips,clip,other,,\n",
    )
    pipeline.build(mine)
    caplog.clear()
    pipeline.build(mine, full=True)
    assert warnings(caplog, "lines differ") == []
    assert ask(mine, "select value from staging.seed_threshold where name = 'runaway_factor'") == [
        (Decimal(mine.runaway_factor),)
    ]
