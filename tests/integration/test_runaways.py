"""Charges far outside their endpoint's own history: found, told once, by thresholds one can set."""

from __future__ import annotations

import statistics
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine

from docs import examples
from faletl import pipeline
from faletl.config import Settings
from faletl.errors import SettingsError
from faletl.models.alerts import MAX_NAMED_RUNAWAYS
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import BillingEvent, Sandbox, UsageLine
from faletl.sandbox.world import runaways_of_hour
from faletl.selection import Asked
from tests.conftest import all_tables, ask, settings_for
from tests.integration.test_cli import faletl
from tests.truth import FLUX, NOW, VIDEO, VOICE, Account, charges, line, quotient

Row = tuple[Any, ...]
FIRST = datetime(2026, 10, 1, tzinfo=UTC)

FOUND = (
    "select requested_at, endpoint_id, cost_total, usual_cost, times_usual, history_days, "
    "charges_known, reason from reports.rpt_runaway_requests order by all"
)


def runaways(
    account: Account, floor: Decimal = Decimal(10), factor: int = 50, alone: int = 1000
) -> list[Row]:
    """What rpt_runaway_requests must hold, charge by charge."""
    by_day: dict[str, dict[Any, list[Decimal]]] = {}
    events = list(account.billing_events(FIRST, NOW))
    for one in events:
        days = by_day.setdefault(one.endpoint_id, {})
        days.setdefault(one.timestamp.date(), []).append(one.cost_total)
    rows: list[Row] = []
    for one in events:
        if one.cost_total < floor:
            continue
        days, today = by_day[one.endpoint_id], one.timestamp.date()
        history = sorted(day for day in days if day < today)[-30:]
        medians = [statistics.median_low(days[day]) for day in history]
        others = list(days[today])
        others.remove(one.cost_total)
        known = sum(len(days[day]) for day in history) if history else len(others)
        usual, reason = None, "no history"
        if history:
            usual, reason = statistics.median_low(medians), "far above earlier days"
        elif others:
            usual, reason = statistics.median_low(others), "far above its day"
        if one.cost_total >= (usual * factor if usual is not None else alone):
            times = quotient(one.cost_total, usual) if usual is not None else None
            at = one.timestamp.replace(tzinfo=None)
            found = (at, one.endpoint_id, one.cost_total, usual, times, len(history), known, reason)
            rows.append(found)
    return sorted(rows)


def at(day: int, hour: int = 5) -> datetime:
    """An hour of a day, counted from the first of October 2026."""
    return FIRST + timedelta(days=day, hours=hour)


def charge(when: datetime, endpoint_id: str, cost: str) -> BillingEvent:
    """A single charge."""
    whole = charges([line(when, endpoint_id, cost, "1")])[1]
    return replace(whole, cost_total=Decimal(cost), request_id=f"{endpoint_id} {cost}")


class Charged(Account):
    """An account whose usage follows from its charges, so that one walk over them is proof enough."""

    def usage(self, start: datetime, end: datetime) -> list[UsageLine]:
        """A line for each charge, in its hour."""
        return [
            line(one.timestamp.replace(minute=0, second=0, microsecond=0), one.endpoint_id,
                 "1", str(one.cost_total))
            for one in self.billing_events(start, end)
        ]  # fmt: skip


@pytest.fixture
def account() -> Account:
    """An account with 54 days of one endpoint, and charges of others that have little history."""
    account = Charged()
    steady = [
        charge(at(day, hour), FLUX, f"0.{(day * 7 + hour * 3) % 40 + 1:02d}")
        for day in range(54)
        for hour in range(1 + day % 4)
        if day % 5 != 3  # not charged each day
    ]
    account.events = [
        *steady,
        charge(at(50), FLUX, "9.99"),  # far above, and too little to look at
        charge(at(50), FLUX, "10"),
        charge(at(51), FLUX, "900"),
        charge(at(51), FLUX, "901"),
        charge(at(40), VIDEO, "1"), charge(at(40), VIDEO, "2"), charge(at(40), VIDEO, "49.99"),
        charge(at(41), VIDEO, "100"), charge(at(41), VIDEO, "99.99"),
        charge(at(42), VOICE, "0.5"), charge(at(42), VOICE, "700"),
        charge(at(43), "x/new", "999.999999999"),
        charge(at(44), "x/free", "0"), charge(at(44), "x/free", "0"), charge(at(44), "x/free", "11"),
        charge(at(45), "x/newer", "1000"),
        charge(at(46), "x/newer", "50000"),
    ]  # fmt: skip
    return account


@pytest.fixture
def settings(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings of a run over all of the account's days."""
    return settings_for(sandbox.url, tmp_path, first_days=60)


EVENTS = Asked(FIRST.date(), resources=["billing_events"])


@pytest.fixture
def sandbox(account: Account) -> Any:
    """The account, served in pages that hold a day."""
    with Sandbox(account) as server:
        yield server


def test_charges_far_outside_their_history_are_found_with_the_figures_of_the_rule(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    assert pipeline.run(settings, EVENTS).exit_code == 0
    expected = runaways(account)
    assert ask(settings, FOUND) == expected
    assert {row[1:3] for row in expected} == {
        (FLUX, Decimal(10)), (FLUX, Decimal(900)), (FLUX, Decimal(901)), (VIDEO, Decimal(100)),
        (VOICE, Decimal(700)), ("x/free", Decimal(11)), ("x/newer", Decimal(1000)),
        ("x/newer", Decimal(50000)),
    }  # fmt: skip


def test_new_ones_are_told_once(
    clock: time_machine.Traveller, account: Account, settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    everything = len(runaways(account))

    def told() -> int:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return sum(one.startswith("runaway charge: ") for one in lines)

    begun = pipeline.run(settings, EVENTS)
    assert begun.failures == []
    first = begun.build
    assert first is not None
    assert first.runaways == everything > MAX_NAMED_RUNAWAYS
    assert f"and {everything - MAX_NAMED_RUNAWAYS} more: see reports.rpt_runaway_requests" in caplog.text
    assert "x/newer was charged 50000 USD for the request x/newer 50000" in caplog.text
    assert told() == MAX_NAMED_RUNAWAYS

    assert account.events is not None
    account.events.append(charge(at(52), FLUX, "800"))
    clock.shift(60)
    second = pipeline.run(settings, Asked(at(52).date(), resources=["billing_events"]))
    assert second.failures == [], second.outcomes
    again = second.build
    assert again is not None
    assert again.runaways == 1
    assert "fal-ai/flux/dev was charged 800 USD" in caplog.text
    assert told() == 1
    full = pipeline.build(settings, full=True).build
    assert full is not None
    assert full.runaways == told() == 0
    alerts = "select count(*), count(resolved_at) from ops.alerts where kind = 'runaway'"
    assert ask(settings, alerts) == [(everything + 1, 0)]

    assert ask(settings, FOUND) == runaways(account)
    assert verify(settings).findings == []
    before = all_tables(settings)
    anew = rebuild(settings).build
    assert anew is not None
    assert anew.runaways == everything + 1
    assert all_tables(settings) == before
    assert ask(settings, alerts) == [(everything + 1, 0)]
    account.events.pop()  # fal took it back
    clock.shift(60)
    pipeline.run(settings, Asked(at(52).date(), resources=["billing_events"]))
    assert ask(settings, alerts) == [(everything + 1, 1)]


def test_thresholds_are_settings(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    pipeline.run(settings, EVENTS)
    for floor, factor, alone in (("9.98", 50, 1000), ("10", 60, 999), ("0.3", 2, 50000)):
        changed = settings.model_copy(
            update={
                "runaway_min_cost": Decimal(floor),
                "runaway_factor": Decimal(factor),
                "runaway_alone": Decimal(alone),
            }
        )
        assert pipeline.build(changed).build is not None
        assert pipeline.build(changed).build is None
        pipeline.publish(changed)
        assert ask(settings, FOUND) == runaways(account, Decimal(floor), factor, alone)


@pytest.mark.parametrize("value", ["0", "-1", "many", "NaN", "1e-13", "1e20"])
def test_a_threshold_is_an_amount_above_zero(value: str) -> None:
    with pytest.raises(SettingsError, match="FALETL_RUNAWAY_FACTOR"):
        Settings.load(runaway_factor=value)


def test_the_command_line_says_how_many_there_are_and_where(
    account: Account, settings: Settings
) -> None:
    assert account.events is not None
    account.events = [charge(at(45), "x/newer", "1000")]
    days = ("--start", "2026-11-15", "--end", "2026-11-16", "--resource", "billing_events")
    done = faletl("run", *days, settings=settings)
    assert "1 new runaway charge: see reports.rpt_runaway_requests" in done.stdout
    assert "runaway charge: x/newer was charged 1000 USD" in done.stderr
    assert "runaway" not in faletl("run", *days, settings=settings).stdout


@pytest.mark.xdist_group("demo")
def test_the_demos_runaways_are_found_and_nothing_else() -> None:
    days = (examples.SHOWN_AT - FIRST).days
    hours = [FIRST + timedelta(hours=n) for n in range(days * 24)]
    ran_away = [
        (one.endpoint_id, round(one.cost_total, 9)) for h in hours for one in runaways_of_hour(7, h)
    ]  # a charge is rounded to a nano-dollar
    found = ask(
        examples.warehouse(),
        "select endpoint_id, cost_total from reports.rpt_runaway_requests "
        f"where requested_at < timestamp '{FIRST.date()}' + interval '{days} days'",
    )
    assert sorted(found) == sorted(ran_away) != []
