"""What a run costs depends on what changed, not on what is there: counts of requests and statements."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import settings_for
from tests.touched import Watch, is_of
from tests.truth import FLUX, VIDEO, VOICE, Account, line

_CHANGED = re.compile(r"(insert into|update|delete from)\s+(\w+)\.", re.IGNORECASE)


def day_of(resource: str) -> Asked:
    """One window: several may be loaded together or not."""
    return Asked(truth.day(22), truth.day(23), [resource])


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often the warehouse was asked: in all, and to change something in each schema."""
    found = Counter[str]()

    def count(*given: Any) -> None:
        changed = _CHANGED.match(given[2].strip())
        found["statements"] += 1
        found[f"{changed[1]} {changed[2]}".lower() if changed else "others"] += 1

    sa.event.listen(sa.Engine, "after_cursor_execute", count)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "after_cursor_execute", count)


def history_of(days: int) -> Account:
    """An account with two lines on each of so many days before today, and an endpoint it never used."""
    at = truth.NOW.replace(hour=5, minute=0) - timedelta(days=1)
    return Account(
        lines=[
            line(at - timedelta(days=ago), endpoint) for ago in range(days) for endpoint in (FLUX, VIDEO)
        ],
        catalogue=[{"endpoint_id": VOICE}],
    )


def costs(days: int, folder: Path, clock: time_machine.Traveller) -> dict[str, Counter[str]]:
    """What it takes to read a day once more, as it is and restated, in a history of so many days."""
    account, found = history_of(days), {}
    with Sandbox(account) as sandbox:
        settings = settings_for(sandbox.url, folder, first_days=days)
        assert pipeline.run(settings).exit_code == 0
        for work, resource in (
            ("unchanged", "usage"),
            ("unchanged", "analytics"),  # asked of all endpoints before, of those that were used now
            ("restated", "usage"),
        ):
            clock.shift(60)
            if work == "restated":
                account.lines[0] = line(account.lines[0].hour, FLUX, "7")
            asked = len(sandbox.requests)
            with counting() as statements:
                report = pipeline.run(settings, day_of(resource))
            outcomes = {outcome.outcome for outcome in report.outcomes}
            assert outcomes == {"unchanged" if work == "unchanged" else "loaded"}
            statements["requests"] = len(sandbox.requests) - asked
            found[f"{work} {resource}"] = statements
    return found


def test_a_day_takes_the_same_requests_and_statements_in_any_history(
    tmp_path: Path, clock: time_machine.Traveller
) -> None:
    short, long = (costs(days, tmp_path / f"{days}", clock) for days in (3, 9))
    assert short == long
    # The account's label; rows and their control total, or two questions.
    assert {found["requests"] for found in short.values()} == {3}
    for resource in ("usage", "analytics"):
        unchanged = short[f"unchanged {resource}"]
        assert not [name for name in unchanged if re.search("raw|marts|reports|staging", name)]
    assert short["restated usage"]["insert into raw"] == 1


def test_an_hourly_run_takes_the_same_statements_and_files_after_any_number_of_runs(
    tmp_path: Path, clock: time_machine.Traveller
) -> None:
    """Yesterday is restated at 10:30, so that it is due at 11:30, 12:30, 14:30 and 18:30."""
    account = history_of(2)
    account.lines += [line(truth.NOW.replace(hour=hour, minute=0), FLUX) for hour in range(21)]
    watch, found = Watch(tmp_path / "landing"), list[tuple[set[str], Counter[str], int]]()
    with Sandbox(account) as sandbox:
        settings = settings_for(sandbox.url, tmp_path, first_days=2)
        assert pipeline.run(settings).exit_code == 0
        account.lines[0] = line(account.lines[0].hour, FLUX, "7")
        assert pipeline.run(settings, day_of("usage")).exit_code == 0
        for _ in range(9):
            clock.shift(timedelta(hours=1))
            watch.start()
            with counting() as statements:
                report = pipeline.run(settings)
            touched = watch.stop()
            assert report.exit_code == 0
            windows = {(one.resource, f"{one.window.day}") for one in report.outcomes}
            assert [path for path in touched if not is_of(path, windows)] == []
            found.append(({day for _, day in windows}, statements, len(touched)))
    at_half_past_one, at_half_past_seven = found[2], found[8]
    assert at_half_past_one == at_half_past_seven
    days, _, touched_files = at_half_past_one
    assert days == {f"{truth.NOW.date()}"}
    assert touched_files > 0
