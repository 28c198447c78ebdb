"""Holds: money that was proven is never wiped unattended, and people decide what happens to it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import HeldError, UsageError
from faletl.landing import extracts
from faletl.line.report import Report
from faletl.operations.accept import accept
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.rename import rename
from faletl.operations.status import status
from faletl.operations.validate import validate
from faletl.operations.verify import verify
from faletl.sandbox import Fault, Sandbox
from faletl.selection import Asked
from faletl.staging.window import stage_window
from tests import laws, truth
from tests.conftest import Query, all_tables, ask, opened, settings_for, total
from tests.truth import NOW, Account, at_hour, line

DAY = timedelta(days=1)
YOUNG, OLD = truth.day(21), NOW.date() - timedelta(days=60)
"""A day that ended less than 45 days ago, and one that ended before that."""

OTHER = YOUNG - DAY
"""A day without charges."""

TODAY = NOW.date()

REASON = "fal confirmed it"


@pytest.fixture
def account() -> Account:
    """An account with a line in each of four hours of the young and of the old day."""
    lines = [
        line(at_hour(day, hour), quantity="4", unit_price="2.5")
        for day in (YOUNG, OLD)
        for hour in range(4)
    ]
    return Account(lines=lines, catalogue=[{"endpoint_id": truth.FLUX}])


@pytest.fixture(autouse=True)
def _stopped(clock: time_machine.Traveller) -> None:
    """The clock stands still unless a test moves it."""


def extract(settings: Settings, day: Any) -> Report:
    """Extract one day by name and load it."""
    return pipeline.run(settings, Asked(day, day + DAY, ["usage", "billing_events", "analytics"]))


def empty(account: Account, day: Any) -> None:
    """Fal does not serve the day any more."""
    account.lines = [one for one in account.lines if one.hour.date() != day]


def freshness(settings: Settings) -> dict[str, int]:
    """The held windows per resource, as a reader sees them."""
    return dict(
        ask(settings, "select resource, held_windows from reports.rpt_freshness where held_windows > 0")
    )


def alerts(settings: Settings) -> list[tuple[Any, ...]]:
    """Subject of each alert, and whether it is over."""
    query = "select kind, subject, resolved_at is not null from ops.alerts order by all"
    return ask(settings, query, through=opened)


def test_hold_keeps_a_closed_day_that_comes_back_empty(
    account: Account, settings: Settings, query: Query
) -> None:
    assert extract(settings, YOUNG).exit_code == 0
    before = all_tables(settings)
    empty(account, YOUNG)
    report = extract(settings, YOUNG)
    assert report.exit_code == 3
    held = sorted(str(error) for _, error in report.failures if isinstance(error, HeldError))
    assert len(held) == len(report.failures) == 3
    assert "4 rows of cost_total 40 are loaded and stay, though fal now serves 0 rows" in held[2]
    assert "faletl accept usage 2026-11-21 --account 'acme' --reason TEXT" in held[2]
    after = all_tables(settings)
    reconciled = after.pop("reports.rpt_reconciliation")
    assert len(reconciled) == 1
    assert after == {name: rows for name, rows in before.items() if name != "reports.rpt_reconciliation"}
    assert query("select distinct status, reason from reports.rpt_reconciliation") == [
        ("held", "usage held")
    ]
    assert freshness(settings) == {"usage": 1, "billing_events": 1, "analytics": 1}
    assert alerts(settings) == [
        ("held", f"{name} {YOUNG}", False) for name in ("analytics", "billing_events", "usage")
    ]
    found = status(settings)
    assert [one["held"] for one in found["resources"]] == [1, 1, 1]
    assert [one["kind"] for one in found["alerts"]] == ["held"] * 3
    assert found["failures"] == []
    laws.check_laws(settings)
    assert verify(settings).findings == []


def test_hold_is_looked_at_again_after_one_two_and_four_hours_and_clears_when_fal_is_well(
    account: Account, sandbox: Sandbox, settings: Settings, clock: time_machine.Traveller
) -> None:
    pipeline.run(settings)
    lines = account.lines
    empty(account, YOUNG)
    extract(settings, YOUNG)
    looks = []
    for hours in range(1, 9):
        clock.shift(timedelta(hours=1))
        report = pipeline.run(settings, Asked(resources=["usage"]))
        looks += [hours for one in report.outcomes if one.outcome == "held"]
    assert looks == [1, 2, 4, 8]
    account.lines = lines
    clock.shift(8 * timedelta(hours=1))
    assert pipeline.run(settings, Asked(resources=["usage"])).exit_code == 0
    assert ("held", f"usage {YOUNG}", True) in alerts(settings)
    assert "usage" not in freshness(settings)
    assert total(settings) == 40


@pytest.mark.parametrize("is_lost_whole", [False, True])
def test_hold_of_an_old_day_is_final(
    is_lost_whole: bool, account: Account, settings: Settings, caplog: pytest.LogCaptureFixture,
    clock: time_machine.Traveller,
) -> None:  # fmt: skip
    assert extract(settings, OLD).exit_code == 0
    account.lines = [
        one for one in account.lines if one.hour.date() != OLD or (one.hour.hour and not is_lost_whole)
    ]
    with caplog.at_level(logging.WARNING):
        report = extract(settings, OLD)
    assert report.exit_code == 0
    assert {one.outcome for one in report.outcomes} == {"held"}
    assert len([one for one in caplog.messages if "usage" in one and "held" in one]) == 1
    assert total(settings) == 40
    assert freshness(settings) == {"usage": 1, "billing_events": 1, "analytics": 1}
    clock.shift(40 * DAY)  # when every day is looked at for the last time
    due = [window.day for one in pipeline.dry_run(settings) for window in one.windows]
    assert OLD not in due
    account.lines.append(line(at_hour(OLD, 0), quantity="4", unit_price="2.5"))
    if not is_lost_whole:  # named, and whole again
        extract(settings, OLD)
        assert freshness(settings) == {}


def test_an_old_day_whose_rows_were_only_restated_is_loaded(
    account: Account, settings: Settings, query: Query
) -> None:
    extract(settings, OLD)
    account.lines = [
        line(one.hour, quantity="2", unit_price="2.5") if one.hour.date() == OLD else one
        for one in account.lines
    ]
    assert extract(settings, OLD).exit_code == 0
    assert total(settings) == 20
    assert query("select count(*) from ops.restatements where resource = 'usage'") == [(1,)]


def test_a_smaller_loss_is_loaded_with_one_warning_and_is_due_again_soon(
    account: Account, settings: Settings, caplog: pytest.LogCaptureFixture, clock: time_machine.Traveller
) -> None:
    extract(settings, YOUNG)
    clock.shift(10 * DAY)
    account.lines = account.lines[1:]
    with caplog.at_level(logging.WARNING):
        assert extract(settings, YOUNG).exit_code == 0
    [warning] = [one for one in caplog.messages if one.startswith("usage") and "removed rows" in one]
    assert (
        "4 rows of cost_total 40 were loaded before, and 3 rows of cost_total 30 are loaded" in warning
    )
    assert total(settings) == 30
    clock.shift(timedelta(hours=1))
    report = pipeline.run(settings, Asked(resources=["usage"]))
    assert YOUNG in {one.window.day for one in report.outcomes}


def test_accept_loads_a_held_day_and_holds_for_it_alone(account: Account, settings: Settings) -> None:
    for day in (YOUNG, OLD):
        extract(settings, day)
    for day in (YOUNG, OLD):
        empty(account, day)
        extract(settings, day)
    report = accept(settings, "usage", YOUNG, reason=REASON)
    assert [(one.outcome, one.rows) for one in report.outcomes] == [("loaded", 0)]
    assert total(settings) == 40
    assert freshness(settings) == {"usage": 1, "billing_events": 2, "analytics": 2}
    query = (
        "select resource, accepted, reason, rows_before, rows_after, cost_total_before, "
        "cost_total_after from ops.acceptances"
    )
    kept = [("usage", "held", REASON, 4, 0, Decimal(40), Decimal(0))]
    assert ask(settings, query, through=opened) == kept
    assert extract(settings, YOUNG).exit_code == 3  # of the others: usage has no rows to lose
    assert ("held", f"usage {YOUNG}", True) in alerts(settings)
    rebuild(settings)
    assert ask(settings, query, through=opened) == kept
    assert total(settings) == 40
    assert freshness(settings) == {"usage": 1, "billing_events": 2, "analytics": 2}
    laws.check_laws(settings)


def test_accept_keep_confirms_what_is_loaded_until_other_rows_are_missing(
    account: Account, settings: Settings
) -> None:
    extract(settings, OLD)
    account.lines = account.lines[:-1]
    extract(settings, OLD)
    accept(settings, "usage", OLD, reason=REASON, is_kept=True)
    assert freshness(settings) == {"billing_events": 1, "analytics": 1}
    again = extract(settings, OLD)
    assert [one.outcome for one in again.outcomes if one.resource == "usage"] == ["unchanged"]
    assert total(settings) == 40
    rebuild(settings)
    assert total(settings) == 40
    assert freshness(settings) == {"billing_events": 1, "analytics": 1}
    account.lines = account.lines[:-1]
    extract(settings, OLD)
    assert freshness(settings)["usage"] == 1
    assert total(settings) == 40


def test_what_was_accepted_holds_after_a_rename_and_a_rebuild(
    account: Account, settings: Settings
) -> None:
    account.lines.append(line(at_hour(OTHER, 5), quantity="-1"))
    account.events = []
    for day in (YOUNG, OLD, OTHER):
        extract(settings, day)
    empty(account, YOUNG)
    account.lines.remove(next(one for one in account.lines if one.hour.date() == OLD))
    for day in (YOUNG, OLD):
        extract(settings, day)
    for day in (YOUNG, OTHER):
        accept(settings, "usage", day, reason=REASON)
    accept(settings, "usage", OLD, reason=REASON, is_kept=True)
    rename(settings, "acme", "Acme Inc.")
    [open_one] = ask(
        settings,
        "select detail from ops.alerts where subject like 'ana%21' and resolved_at is null",
        through=opened,
    )
    assert "faletl accept analytics 2026-11-21 --account 'Acme Inc.'" in open_one[0]
    before = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == before
    for day in (YOUNG, OLD, OTHER):
        [usage] = pipeline.run(settings, Asked(day, day + DAY, ["usage"])).outcomes
        assert usage.outcome == "unchanged"


@pytest.mark.parametrize("day", [None, YOUNG])
def test_what_is_held_or_refused_can_be_accepted_after_a_rebuild(
    day: Any, account: Account, settings: Settings, clock: time_machine.Traveller
) -> None:
    extract(settings, YOUNG)
    account.events = []
    account.lines = [line(at_hour(YOUNG, 5), quantity="-1"), *account.lines]
    clock.shift(timedelta(hours=1))
    assert extract(settings, YOUNG).exit_code == 3
    rebuild(settings, day)
    for resource in ("usage", "billing_events"):
        report = accept(settings, resource, YOUNG, reason=REASON)
        assert [one.outcome for one in report.outcomes] == ["loaded"]
    assert total(settings) == Decimal("39.975")
    assert freshness(settings) == {}
    assert ask(settings, "select count(*) from ops.failures", through=opened) == [(0,)]


def test_accept_means_the_newest_extract(
    account: Account, settings: Settings, clock: time_machine.Traveller
) -> None:
    extract(settings, YOUNG)
    lines = account.lines
    empty(account, YOUNG)
    clock.shift(timedelta(hours=1))
    pipeline.run(settings, Asked(YOUNG, YOUNG + DAY, ["usage"]))
    account.lines = [*lines, line(at_hour(YOUNG, 5), quantity="-1")]
    clock.shift(timedelta(hours=1))
    refused = pipeline.run(settings, Asked(YOUNG, YOUNG + DAY, ["usage"]))
    assert "faletl accept usage 2026-11-21 --account 'acme' --reason TEXT" in str(refused.failures[0][1])
    accept(settings, "usage", YOUNG, reason=REASON)
    assert total(settings) == Decimal("39.975")
    assert freshness(settings) == {}


def test_accept_of_an_extract_that_another_one_replaced_accepts_nothing(
    account: Account, settings: Settings, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(settings, YOUNG)
    lines = account.lines
    empty(account, YOUNG)
    clock.shift(timedelta(hours=1))
    extract(settings, YOUNG)

    def meanwhile(*given: Any) -> Any:
        account.lines = lines
        clock.shift(timedelta(hours=1))
        extract(settings, YOUNG)
        return stage_window(*given)

    monkeypatch.setattr("faletl.operations.accept.stage_window", meanwhile)
    with pytest.raises(UsageError, match="another extract of that day was loaded meanwhile"):
        accept(settings, "usage", YOUNG, reason=REASON)
    assert total(settings) == 40
    assert ask(settings, "select count(*) from ops.acceptances", through=opened) == [(0,)]


def test_a_day_that_is_held_for_good_counts_as_settled(
    account: Account, settings: Settings, clock: time_machine.Traveller, query: Query
) -> None:
    account.lines.append(line(at_hour(TODAY, 1)))
    pipeline.run(settings, Asked(TODAY, TODAY + DAY, ["usage"]))
    clock.shift(60 * DAY)
    account.lines = []
    assert extract(settings, TODAY).exit_code == 0
    state = "select is_provisional, is_settled, window_end from ops.loads where is_current and rows > 0"
    settled = [(False, True, at_hour(TODAY + DAY, 0))]
    assert query(state) == settled
    rebuild(settings)
    assert query(state) == settled


def test_a_day_whose_rows_are_kept_is_not_open_any_more(
    account: Account, settings: Settings, clock: time_machine.Traveller, query: Query
) -> None:
    account.lines.append(line(at_hour(TODAY, 1)))
    pipeline.run(settings, Asked(TODAY, TODAY + DAY, ["usage"]))
    clock.shift(2 * DAY)
    account.lines = [one for one in account.lines if one.hour.date() != TODAY]
    assert extract(settings, TODAY).exit_code == 3
    accept(settings, "usage", TODAY, reason=REASON, is_kept=True)
    state = "select is_provisional, is_settled from ops.loads where is_current and rows > 0"
    assert query(state) == [(False, True)]
    rebuild(settings)
    assert query(state) == [(False, True)]
    clock.shift(timedelta(hours=1))
    [due] = [one for one in pipeline.dry_run(settings) if one.resource == "usage"]
    assert TODAY not in {window.day for window in due.windows}


def test_a_kill_between_a_hold_and_its_receipt_loses_nothing(
    account: Account, settings: Settings
) -> None:
    extract(settings, YOUNG)
    empty(account, YOUNG)
    extract(settings, YOUNG)
    held = ask(settings, "select landing_path from ops.holds", through=opened)
    for (path,) in held:
        Path(settings.landing, path, extracts.RECEIPT).unlink()
    before = freshness(settings)
    rebuild(settings)
    assert freshness(settings) == before
    assert len(ask(settings, "select landing_path from ops.holds", through=opened)) == len(held)
    assert total(settings) == 40


def test_a_refused_day_stays_refused_while_fal_is_down(
    account: Account, settings: Settings, sandbox: Sandbox, query: Query
) -> None:
    account.lines.append(line(at_hour(YOUNG, 5), quantity="-1"))
    extract(settings, YOUNG)
    shown = "select usage_date, status, reason from reports.rpt_reconciliation order by all"
    before = query(shown)
    sandbox.fault = lambda request: Fault(status=503) if request.path == "/models/usage" else None
    assert extract(settings, YOUNG).exit_code == 1
    pipeline.build(settings, full=True)
    assert query(shown) == before
    assert query("select error from ops.failures where resource = 'usage'") == [("DataRefusedError",)]


def test_accept_refuses_what_is_not_held(account: Account, settings: Settings) -> None:
    with pytest.raises(UsageError, match="usage 2026-11-21 is not held"):
        accept(settings, "usage", YOUNG, reason=REASON)
    extract(settings, YOUNG)
    with pytest.raises(UsageError, match="usage 2026-11-21 is not held"):
        accept(settings, "usage", YOUNG, reason=REASON, is_kept=True)
    with pytest.raises(UsageError, match="--reason must be a text"):
        accept(settings, "usage", YOUNG, reason=" \n")
    assert ask(settings, "select count(*) from ops.acceptances", through=opened) == [(0,)]


def test_decisions_survive_the_warehouse(account: Account, settings: Settings, tmp_path: Path) -> None:
    extract(settings, YOUNG)
    empty(account, YOUNG)
    extract(settings, YOUNG)
    accept(settings, "usage", YOUNG, reason=REASON)
    written = (json.loads(one.read_bytes()) for one in Path(settings.landing, ".decisions").iterdir())
    assert [one["reason"] for one in written if one["kind"] == "window_accepted"] == [REASON]
    shutil.copytree(settings.landing, tmp_path / "elsewhere" / "landing")
    lost = settings_for(settings.api_url, tmp_path / "elsewhere")
    rebuild(lost)
    assert total(lost) == 0
    assert freshness(lost) == {"billing_events": 1, "analytics": 1}
    assert all_tables(lost) == all_tables(settings)


def test_prune_keeps_what_holds_and_acceptances_need(account: Account, settings: Settings) -> None:
    for day in (YOUNG, OLD):
        extract(settings, day)
        empty(account, day)
        for _ in range(3):
            extract(settings, day)
    accept(settings, "usage", YOUNG, reason=REASON)
    before = all_tables(settings)
    prune(settings)
    assert verify(settings).findings == []
    assert accept(settings, "billing_events", YOUNG, reason=REASON).exit_code == 0
    rebuild(settings)
    after = all_tables(settings)
    assert after["reports.rpt_spend_daily"] == before["reports.rpt_spend_daily"]
    assert freshness(settings) == {"usage": 1, "billing_events": 1, "analytics": 2}


def test_a_refused_day_that_holds_nothing_is_a_row_of_its_own(
    account: Account, settings: Settings, query: Query
) -> None:
    columns = (
        "usage_date, endpoint_id, currency, usage_cost_total, events_cost_total, difference, "
        "charge_count, status, reason"
    )
    account.lines.append(line(at_hour(YOUNG, 5), quantity="-1"))
    assert extract(settings, YOUNG).exit_code == 3
    assert query(f"select {columns} from reports.rpt_reconciliation") == [
        (YOUNG, None, "XXX", None, None, None, None, "refused", "usage quarantined")
    ]
    assert freshness(settings) == {}
    assert query("select open_failures from reports.rpt_freshness where resource = 'usage'") == [(1,)]
    subjects = [f"billing_events {YOUNG}", f"usage {YOUNG}"]
    assert alerts(settings) == [("refused", subject, False) for subject in subjects]
    for day in (None, YOUNG):
        rebuild(settings, day)
        assert query("select open_failures from reports.rpt_freshness where resource = 'usage'") == [
            (1,)
        ]
        assert alerts(settings) == [("refused", subject, False) for subject in subjects]
    account.lines.pop()
    assert extract(settings, YOUNG).exit_code == 0
    assert alerts(settings) == [("refused", subject, True) for subject in subjects]
    assert query("select distinct status from reports.rpt_reconciliation") == [("matched",)]


def test_accept_loads_a_day_with_a_negative_line_and_later_ones_with_the_same_line(
    account: Account, settings: Settings, clock: time_machine.Traveller
) -> None:
    account.lines.append(line(at_hour(YOUNG, 5), quantity="-1"))
    account.events = []
    assert extract(settings, YOUNG).exit_code == 3
    with pytest.raises(UsageError, match="billing_events 2026-11-21 is not held"):
        accept(settings, "billing_events", YOUNG, reason=REASON)
    report = accept(settings, "usage", YOUNG, reason=REASON)
    assert [(one.outcome, one.rows) for one in report.outcomes] == [("loaded", 5)]
    assert total(settings) == Decimal("39.975")
    assert ask(settings, "select count(*) from ops.failures where resource = 'usage'") == [(0,)]
    assert ("refused", f"usage {YOUNG}", True) in alerts(settings)
    assert verify(settings).findings == []
    assert validate(settings, Asked(resources=["usage"])).exit_code == 0
    clock.shift(timedelta(hours=1))
    again = extract(settings, YOUNG)
    assert [one.outcome for one in again.outcomes if one.resource == "usage"] == ["unchanged"]
    before = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == before
    account.lines += [line(at_hour(YOUNG, 6), quantity="-2"), line(at_hour(OTHER, 5), quantity="-1")]
    for day in (YOUNG, OTHER):  # a row that is not accepted; the accepted row on another day
        assert extract(settings, day).exit_code == 3
    assert total(settings) == Decimal("39.975")


def test_what_was_accepted_for_an_account_does_not_hold_for_another(
    account: Account, settings: Settings
) -> None:
    account.lines.append(line(at_hour(YOUNG, 5), quantity="-1"))
    account.events = []
    extract(settings, YOUNG)
    accept(settings, "usage", YOUNG, reason=REASON)
    other = replace(account, account="initech", requests="initech")
    with Sandbox(other, keys={truth.OTHER_KEY: "FULL"}) as server:
        theirs = settings_for(server.url, Path(settings.landing).parent, key=truth.OTHER_KEY)
        assert extract(theirs, YOUNG).exit_code == 3
    assert total(settings) == Decimal("39.975")


@hypothesis.settings(max_examples=8)
@given(served=st.lists(st.sampled_from(["all", "none", "half"]), min_size=2, max_size=4))
def test_no_sequence_of_answers_empties_a_day_unattended(
    served: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("held")
    lines = [line(at_hour(YOUNG, hour), quantity="4", unit_price="2.5") for hour in range(4)]
    account = Account(lines=lines)
    loaded: int | None = None
    with time_machine.travel(NOW, tick=False) as clock, Sandbox(account, page_size=4) as server:
        settings = settings_for(server.url, folder, first_days=0)
        for answer in served:
            account.lines = {"all": lines, "none": [], "half": lines[:2]}[answer]
            report = pipeline.run(settings, Asked(YOUNG, YOUNG + DAY, ["usage"]))
            is_held = answer == "none" and bool(loaded)
            assert report.exit_code == (3 if is_held else 0)
            if not is_held:
                loaded = 10 * len(account.lines)
            assert total(settings) == loaded
            clock.shift(timedelta(hours=1))
        laws.check_ledger(settings)
        before = all_tables(settings)
        rebuild(settings)
        assert all_tables(settings) == before
