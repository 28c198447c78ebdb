"""Horizons: what was asked for is written down before fal is asked, and alone decides what is due."""

from __future__ import annotations

import shutil
import signal
from datetime import date, timedelta
from pathlib import Path

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from faletl import pipeline
from faletl.config import FINGERPRINT, Settings
from faletl.errors import UsageError
from faletl.line import distributed
from faletl.line.accounts import set_horizon
from faletl.operations.rebuild import rebuild
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse import horizons
from faletl.warehouse.horizons import BY_DAY, Horizon
from faletl.windows import FIRST_DAY
from tests import truth
from tests.conftest import ask, opened, settings_for
from tests.forked import Trap, start
from tests.truth import NOW, OTHER_KEY, Account, day

pytestmark = pytest.mark.usefixtures("clock")

FROM_20 = Asked(day(20), day(24))


def held(settings: Settings) -> dict[tuple[str, str], date]:
    """The first day by owner (a key without an account is "") and resource."""
    found = ask(settings, "select account, resource, first_day from ops.horizons", opened)
    return {
        ("" if owner.startswith(FINGERPRINT) else owner, name): first for owner, name, first in found
    }


def of_all(owner: str, first: date) -> dict[tuple[str, str], date]:
    """The same day for each resource by day."""
    return {(owner, name): first for name in BY_DAY}


def loaded(settings: Settings, resource: str = "usage") -> list[date]:
    """The days that are loaded."""
    return [
        first
        for (first,) in ask(
            settings,
            "select distinct cast(window_start as date) from ops.loads "
            f"where resource = '{resource}' and is_current order by all",
            opened,
        )
    ]


def days_asked(sandbox: Sandbox, since: int = 0) -> set[str]:
    """The days whose usage was asked for, rows and total."""
    asked = (one for one in sandbox.requests[since:] if one.path == "/models/usage")
    return {one.query["start"][0][:10] for one in asked if "limit" not in one.query}


# --- Nothing asked for is forgotten ---------------------------------------------------------------


@pytest.mark.parametrize(
    "trap",
    [
        Trap("faletl.fal.client.FalClient.get", "before"),
        Trap("faletl.fal.client.FalClient.get"),  # the username is known, nothing is bound
        Trap("faletl.fal.client.FalClient.get", nth=2),  # usage was answered
        Trap("faletl.landing.decisions.record", nth=2),  # bound, not committed
        Trap("faletl.landing.extracts.OpenExtract.land", "before"),
    ],
    ids=["nothing asked", "one answer", "two answers", "binding", "landing"],
)
def test_a_first_run_that_is_killed_forgets_no_day_that_it_was_asked_for(
    trap: Trap, settings: Settings
) -> None:
    command = "run --start 2026-11-18"
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    assert set(held(settings).values()) == {day(18)}
    assert pipeline.run(settings).exit_code == 0
    for name in BY_DAY:
        if name != "analytics":  # only days with endpoints to ask for
            assert loaded(settings, name) == [day(number) for number in range(18, 24)]
    assert held(settings) == of_all("acme", day(18))


def test_a_first_plain_run_that_is_killed_is_remembered_for_as_many_days(
    settings: Settings, clock: time_machine.Traveller
) -> None:
    trap = Trap("faletl.fal.client.FalClient.get", "before")
    assert start(settings, trap).finish()[0] == -signal.SIGKILL
    clock.shift(timedelta(days=3))
    assert pipeline.run(settings).exit_code == 0
    assert loaded(settings) == [day(number) for number in range(21, 27)]


@pytest.mark.parametrize(
    ("killed", "first"),
    [(["run"], 21), (["run --start 2026-11-19"], 19), (["run", "run --start 2026-11-19"], 14)],
    ids=["plain", "named", "both"],
)
def test_days_named_with_a_new_key_of_a_known_account_become_the_accounts(
    killed: list[str], first: int, account: Account, tmp_path: Path
) -> None:
    keys = ("first:0123456789", OTHER_KEY)
    with Sandbox(account, keys=dict.fromkeys(keys, "FULL")) as server:
        known, new = (settings_for(server.url, tmp_path, key=key) for key in keys)
        pipeline.run(known)
        trap = Trap("faletl.fal.client.FalClient.get", "before")
        for command in killed:
            child = start(new, trap, command=command, FAL_KEY=OTHER_KEY, FALETL_FIRST_DAYS="9")
            assert child.finish()[0] == -signal.SIGKILL
        assert of_all("acme", day(21)).items() < held(new).items()
        assert pipeline.run(new).exit_code == 0
    # A plain run of the key is not the first one of its account, so that it alone moves nothing.
    assert held(new) == of_all("acme", day(first))
    assert loaded(new)[0] == day(first)


def test_a_run_that_is_refused_leaves_the_horizons_as_they_were(
    account: Account, settings: Settings, sandbox: Sandbox, tmp_path: Path
) -> None:
    pipeline.run(settings)
    before = held(settings)
    swapped = settings_for(sandbox.url, tmp_path, account="other")
    assert pipeline.run(swapped, Asked(day(1))).exit_code == 2
    assert held(settings) == before
    account.account = "someone-else"
    with Sandbox(account, keys={OTHER_KEY: "FULL"}) as server:
        unknown = settings_for(server.url, tmp_path, key=OTHER_KEY, account="acme")
        assert pipeline.run(unknown, Asked(day(1))).exit_code == 2
    assert held(settings) == before


# --- What moves them, and what does not -----------------------------------------------------------


def test_the_first_plain_run_goes_back_by_first_days_and_no_later_one_does(
    settings: Settings, sandbox: Sandbox, clock: time_machine.Traveller
) -> None:
    pipeline.run(settings, Asked(day(22), day(23), ["usage"]))
    assert held(settings) == {("acme", "usage"): day(22)}
    pipeline.run(settings)
    assert held(settings) == of_all("acme", day(21))
    clock.shift(timedelta(hours=1))
    pipeline.run(settings.model_copy(update={"first_days": 9}))
    assert held(settings) == of_all("acme", day(21))
    pipeline.run(settings, Asked(day(19), day(20), ["billing_events"]))
    assert held(settings) == of_all("acme", day(21)) | {("acme", "billing_events"): day(19)}
    asked = len(sandbox.requests)
    clock.shift(timedelta(hours=1))
    pipeline.run(settings)
    assert loaded(settings, "billing_events")[:2] == [day(19), day(20)]
    assert days_asked(sandbox, asked) <= {"2026-11-21", "2026-11-22", "2026-11-23", "2026-11-20"}


def test_a_horizon_moved_back_is_due_and_moved_on_deletes_and_asks_nothing(
    settings: Settings, sandbox: Sandbox, clock: time_machine.Traveller
) -> None:
    pipeline.run(settings)
    set_horizon(settings, day(19), ["usage"])
    assert held(settings)["acme", "usage"] == day(19)
    clock.shift(timedelta(hours=1))
    pipeline.run(settings)
    assert loaded(settings)[0] == day(19)
    assert loaded(settings, "billing_events")[0] == day(21)
    before = ask(settings, "select * from raw.usage where bucket < '2026-11-23' order by all")
    set_horizon(settings, day(23))
    asked = len(sandbox.requests)
    clock.shift(timedelta(days=2))
    pipeline.run(settings)
    assert days_asked(sandbox, asked) == {"2026-11-23", "2026-11-24", "2026-11-25"}
    assert ask(settings, "select * from raw.usage where bucket < '2026-11-23' order by all") == before
    assert held(settings) == of_all("acme", day(23))


def test_a_horizon_set_before_the_first_run_decides(settings: Settings) -> None:
    with pytest.raises(UsageError, match="there is no account yet"):
        set_horizon(settings.model_copy(update={"key": None}), day(22))
    set_horizon(settings, day(22))
    assert held(settings) == of_all("", day(22))
    pipeline.run(settings)
    assert held(settings) == of_all("acme", day(22))
    assert loaded(settings) == [day(22), day(23)]


@pytest.mark.parametrize(
    ("first", "resources", "said"),
    [
        (date(2020, 12, 31), [], "--set 2020-12-31 is out of range"),
        (day(25), [], "--set 2026-11-25 is out of range"),
        (date.max, [], "out of range"),
        (date.min, [], "out of range"),
        (day(22), ["prices"], "prices is a snapshot"),
        (day(22), ["usage", "credits"], "credits is a snapshot"),
    ],
)
def test_a_horizon_that_cannot_be_meant_is_refused_and_makes_no_warehouse(
    first: date, resources: list[str], said: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        set_horizon(settings, first, resources)
    assert not list(tmp_path.iterdir())


def test_of_several_accounts_the_one_that_is_named_or_asks_is_meant(
    account: Account, settings: Settings, tmp_path: Path
) -> None:
    other = truth.two_days()
    other.account, other.requests = "beta", "beta/"
    day_21 = Asked(day(21), day(22), ["usage"])
    pipeline.run(settings, day_21)
    with Sandbox(other, keys={OTHER_KEY: "FULL"}) as server:
        second = settings_for(server.url, tmp_path, key=OTHER_KEY)
        pipeline.run(second, day_21)
    set_horizon(second, day(19), ["usage"])
    assert held(settings) == {("acme", "usage"): day(21), ("beta", "usage"): day(19)}
    set_horizon(second, day(18), ["usage"], "acme")
    assert held(settings)["acme", "usage"] == day(18)
    set_horizon(second.model_copy(update={"account": "acme"}), day(17), ["usage"])
    assert held(settings)["acme", "usage"] == day(17)
    with pytest.raises(UsageError, match="name the account"):
        set_horizon(settings.model_copy(update={"key": None}), day(17))
    with pytest.raises(UsageError, match="there is no account 'gamma'"):
        set_horizon(settings, day(17), [], "gamma")


def test_a_plan_in_pieces_follows_the_same_horizon(settings: Settings) -> None:
    path = distributed.make_plan(settings, Asked(resources=["usage"]))
    assert path is not None
    assert held(settings) == {("acme", "usage"): day(21)}
    set_horizon(settings, day(23), ["usage"])
    path = distributed.make_plan(settings, Asked(resources=["usage"]))
    assert path is not None
    assert [one.start.date() for one in distributed.read_plan(path).windows] == [day(23)]
    # A run by hand over recent days does what is due as long as nothing is loaded.
    distributed.make_plan(settings, Asked(day(23), day(24), ["billing_events"]), is_first_due=True)
    assert held(settings)["acme", "billing_events"] == day(21)


def test_a_dry_run_writes_nothing_and_counts_what_a_run_would_do(
    settings: Settings, tmp_path: Path
) -> None:
    forecasts = {one.resource: len(one.windows) for one in pipeline.dry_run(settings, Asked(day(18)))}
    assert forecasts["usage"] == 6
    assert not list(tmp_path.iterdir())
    pipeline.run(settings)
    before = held(settings)
    forecasts = {one.resource: len(one.windows) for one in pipeline.dry_run(settings, Asked(day(18)))}
    assert forecasts["usage"] == 6
    assert held(settings) == before


def test_a_rebuild_brings_horizons_back_as_they_were_decided(
    settings: Settings, clock: time_machine.Traveller
) -> None:
    pipeline.run(settings, Asked(day(20)))
    set_horizon(settings, day(22), ["usage"])
    before = held(settings)
    rebuild(settings)
    assert held(settings) == before
    clock.shift(timedelta(hours=1))
    pipeline.run(settings)
    assert held(settings)["acme", "usage"] == day(22)


def test_a_rebuild_from_pages_without_decisions_takes_the_first_days_that_were_planned(
    settings: Settings,
) -> None:
    pipeline.run(settings, Asked(day(20)))
    shutil.rmtree(Path(settings.landing) / ".decisions")
    rebuild(settings)
    assert held(settings) == of_all("acme", day(20))
    assert pipeline.run(settings).account == "acme"


# --- The rule -------------------------------------------------------------------------------------

DAYS = st.dates(FIRST_DAY, NOW.date())
ROWS = st.builds(Horizon, DAYS, st.booleans())
HELD = st.dictionaries(st.sampled_from(BY_DAY), ROWS)
WHAT = st.tuples(st.none() | DAYS, st.lists(st.sampled_from(BY_DAY), unique=True))
OWNERS = st.sampled_from(["acme", f"{FINGERPRINT}salt$digest"])


@given(HELD, WHAT, OWNERS, st.integers(0, 3000))
def test_asking_moves_no_horizon_on_and_a_second_time_nothing(
    before: dict[str, Horizon], what: tuple[date | None, list[str]], owner: str, first_days: int
) -> None:
    start, resources = what
    with time_machine.travel(NOW, tick=False):
        asked = Asked(start, resources=resources)
        after = horizons.moved(before, owner, asked, NOW, first_days)
        assert horizons.moved(after, owner, asked, NOW, first_days) == after
    for name in BY_DAY:
        if resources and name not in resources:
            assert after.get(name) == before.get(name)
            continue
        assert after[name].first_day >= FIRST_DAY
        if name in before:
            assert after[name].first_day <= before[name].first_day
        if start is not None:
            assert after[name].first_day <= start


@given(HELD, HELD)
def test_a_label_forgets_no_day_when_it_gets_the_horizons_of_its_key(
    own: dict[str, Horizon], pending: dict[str, Horizon]
) -> None:
    after = horizons.merged(own, pending)
    for name, row in own.items():
        assert after[name].first_day <= row.first_day
        assert after[name].is_decided >= row.is_decided
    for name, row in pending.items():
        if not (row.is_decided and name in own and own[name].is_decided):
            assert after[name].first_day <= row.first_day
        else:
            assert after[name] == own[name]
