"""Accounts: whose a key is, what contradicts it, two labels for one account, renaming and forgetting."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import CheckFailedError, LeaseLostError, UsageError
from faletl.invented import HEADER
from faletl.landing import extracts
from faletl.landing.decisions import AccountBound, recorded
from faletl.line import distributed
from faletl.line.accounts import known_accounts
from faletl.line.overlap import SharedChargesError, UnknownOverlapError
from faletl.line.release import build_and_publish
from faletl.line.report import Report
from faletl.operations.accept import accept
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.rename import extent, forget, rename
from faletl.operations.verify import verify
from faletl.sandbox import FULL_KEY, READONLY_KEY, Fault, Request, Sandbox
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import open_warehouse
from tests import truth
from tests.conftest import all_tables, ask, opened, settings_for
from tests.forked import Trap, start
from tests.leaks import everything_in, leaks
from tests.truth import OTHER_KEY, Account

pytestmark = pytest.mark.usefixtures("clock")

BOTH = {FULL_KEY: "FULL", OTHER_KEY: "FULL"}
BILLING = "/account/billing"
SPENT = "select account, sum(cost_total) from reports.rpt_spend_daily group by 1"


@pytest.fixture
def other() -> Account:
    """A second account, with charges of its own."""
    account = truth.two_days()
    account.account, account.requests = "beta", "beta/"
    account.lines = account.lines[:5]
    return account


def refusing(status: int = 403, path: str = BILLING) -> Callable[[Request], Fault | None]:
    """A fal that answers so to one path."""
    return lambda request: Fault(status=status) if request.path == path else None


def as_fal(_: Request) -> Fault:
    """An answer without the mark of the sandbox."""
    return Fault(headers={HEADER: ""})


def spent(settings: Settings) -> dict[str, object]:
    """What is published, per account."""
    return dict(ask(settings, SPENT))


def costs(*accounts: Account) -> dict[str, object]:
    """What was served, per account."""
    return {one.account: sum(line.cost_total for line in one.lines) for one in accounts}


def bound(settings: Settings) -> dict[str, tuple[tuple[str, ...], int]]:
    """The usernames of each label, and how many keys."""
    with open_warehouse(settings).reading() as connection:
        assert connection is not None
        known = known_accounts(connection)
    return {label: (one.usernames, len(one.key_ids)) for label, one in known.items()}


def what_was_decided(settings: Settings) -> list[list[tuple[object, ...]]]:
    """What a lost warehouse gets back from the decisions next to the landed pages."""
    return [
        ask(settings, f"select {columns} order by all", opened)
        for columns in (
            "account, usernames, key_ids, is_sandbox from ops.accounts",
            "account, resource, first_day, is_decided from ops.horizons",
        )
    ]


def refusal(settings: Settings, asked: Asked = EVERYTHING_DUE) -> str:
    """The sentence of a run that is refused as wrong use."""
    report = pipeline.run(settings, asked)
    assert report.exit_code == 2
    [(_, error)] = report.failures
    assert isinstance(error, UsageError)
    return str(error)


# --- Whose a key is -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_known_key_keeps_its_label_where_fal_does_not_say_the_username(
    status: int, account: Account, settings: Settings, sandbox: Sandbox, clock: time_machine.Traveller
) -> None:
    pipeline.run(settings)
    sandbox.fault = refusing(status)
    clock.shift(timedelta(hours=1))
    report = pipeline.run(settings)
    assert report.account == "acme"
    assert spent(settings) == costs(account)
    assert bound(settings) == {"acme": (("acme",), 1)}


def test_a_new_username_under_a_known_key_keeps_its_label_and_is_warned_about_once(
    account: Account, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.run(settings)
    account.account = "acme-inc"
    told = []
    for _ in range(2):
        caplog.clear()
        assert pipeline.run(settings).account == "acme"
        told.append([one.getMessage() for one in caplog.records if "acme-inc" in one.getMessage()])
    assert told == [["fal renamed the account 'acme' to 'acme-inc'; it keeps its label 'acme'"], []]
    assert set(spent(settings)) == {"acme"}
    account.account = "acme"
    pipeline.run(settings)
    assert bound(settings) == {"acme": (("acme-inc", "acme"), 1)}


def test_a_second_key_of_an_account_is_known_by_the_username_and_from_then_on_by_itself(
    account: Account, tmp_path: Path
) -> None:
    with Sandbox(account, keys=BOTH) as server:
        first, second = (settings_for(server.url, tmp_path, key=key) for key in BOTH)
        pipeline.run(first)
        pipeline.run(second)
        server.fault = refusing()
        pipeline.run(second)
    assert bound(first) == {"acme": (("acme",), 2)}
    assert spent(first) == costs(account)


def test_an_unknown_key_of_nobody_is_refused_until_somebody_says_whose_it_is(
    account: Account, tmp_path: Path
) -> None:
    with Sandbox(account, keys=BOTH) as server:
        pipeline.run(settings_for(server.url, tmp_path))
        server.fault = refusing(401)
        unknown = settings_for(server.url, tmp_path, key=OTHER_KEY)
        before = all_tables(unknown)
        assert "set FALETL_ACCOUNT" in refusal(unknown)
        assert all_tables(unknown) == before
        named = unknown.model_copy(update={"account": "acme"})
        assert pipeline.run(named).account == "acme"
        assert pipeline.run(unknown).account == "acme"
    assert spent(unknown) == costs(account)


def test_the_first_account_is_default_if_fal_does_not_say_its_name_and_stays_it_when_fal_does(
    account: Account, settings: Settings, sandbox: Sandbox
) -> None:
    sandbox.fault = refusing()
    assert pipeline.run(settings).exit_code == 0
    sandbox.fault = None
    assert pipeline.run(settings).exit_code == 0
    assert bound(settings) == {"default": (("acme",), 1)}
    assert set(spent(settings)) == {"default"}


@pytest.mark.parametrize("status", [500, 503])
def test_an_account_that_cannot_be_asked_for_fails_the_run_and_makes_none(
    status: int, settings: Settings, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faletl.fal.client.TRIES", 1)
    pipeline.run(settings)
    sandbox.fault = refusing(status)
    assert pipeline.run(settings).exit_code == 1
    assert set(bound(settings)) == {"acme"}


@pytest.mark.parametrize(
    ("key", "fault", "code"),
    [
        (READONLY_KEY, None, 2),
        ("nobody:0123456789", None, 2),
        (FULL_KEY, refusing(500, "/models/usage"), 1),
    ],
    ids=["no permission", "no key", "no answer"],
)
def test_nothing_is_bound_before_fal_has_answered_a_question_about_usage(
    key: str,
    fault: Callable[[Request], Fault | None] | None,
    code: int,
    settings: Settings,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("faletl.fal.client.TRIES", 1)
    sandbox.fault = fault
    wrong = settings.model_copy(update={"key": settings_for("http://127.0.0.1:9", Path(), key=key).key})
    assert pipeline.run(wrong).exit_code == code
    assert bound(wrong) == {}
    sandbox.fault = None
    assert pipeline.run(settings.model_copy(update={"account": "mine"})).exit_code == 0
    assert bound(settings) == {"mine": (("acme",), 1)}


def test_a_key_that_may_not_read_usage_can_be_used_for_an_account_that_is_bound(
    account: Account, settings: Settings, sandbox: Sandbox, tmp_path: Path
) -> None:
    pipeline.run(settings)
    readonly = settings_for(sandbox.url, tmp_path, key=READONLY_KEY)
    assert pipeline.run(readonly, Asked(resources=["credits"])).exit_code == 0
    assert bound(settings) == {"acme": (("acme",), 1)}
    assert pipeline.run(readonly).exit_code == 2  # usage is never left out


def test_no_part_of_a_key_stands_in_what_binds_an_account(account: Account, tmp_path: Path) -> None:
    keys = {"0f6d3a52-77aa-4d0e-9d1c:5f1c9be0d7a24c6e": "FULL"}
    with Sandbox(account, keys=keys) as server:
        [key] = keys
        settings = settings_for(server.url, tmp_path, key=key)
        pipeline.run(settings)
    kept = ask(settings, "select key_ids from ops.accounts", opened)
    assert len(json.loads(kept[0][0])) == 1
    decided = everything_in(tmp_path / "landing" / ".decisions")
    assert any(isinstance(one, AccountBound) and one.key_id for one in recorded(settings))
    assert leaks(key, decided + repr(kept).encode()) == set()


# --- What contradicts -----------------------------------------------------------------------------


def test_a_label_set_later_is_refused_and_the_command_that_gives_it_is_named(
    account: Account, settings: Settings, sandbox: Sandbox
) -> None:
    pipeline.run(settings)
    asked, before = len(sandbox.requests), all_tables(settings)
    said = refusal(settings.model_copy(update={"account": "prod"}))
    assert "faletl accounts rename 'acme' 'prod'" in said
    assert len(sandbox.requests) == asked  # the key is known
    assert all_tables(settings) == before


@pytest.mark.parametrize("is_known", [True, False])
def test_the_key_of_another_account_is_refused_under_a_label(
    is_known: bool, account: Account, other: Account, tmp_path: Path
) -> None:
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        alpha = settings_for(server.url, tmp_path, account="alpha")
        swapped = settings_for(others.url, tmp_path, account="alpha", key=OTHER_KEY)
        pipeline.run(alpha)
        if is_known:
            pipeline.run(swapped.model_copy(update={"account": None}))
        before = all_tables(alpha)
        for asked in (EVERYTHING_DUE, Asked(truth.day(21), truth.day(23))):
            said = refusal(swapped, asked)
            assert "'alpha'" in said
            assert "'beta'" in said
        assert all_tables(alpha) == before


def test_a_username_that_is_another_accounts_label_needs_a_label_of_its_own(
    account: Account, other: Account, tmp_path: Path
) -> None:
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        pipeline.run(settings_for(server.url, tmp_path, account="beta"))
        settings = settings_for(others.url, tmp_path, key=OTHER_KEY)
        assert "set FALETL_ACCOUNT to another label" in refusal(settings)
        named = settings.model_copy(update={"account": "second"})
        assert pipeline.run(named).exit_code == 0
        assert pipeline.run(settings).account == "second"
    assert bound(settings) == {"beta": (("acme",), 1), "second": (("beta",), 1)}


def test_a_key_whose_username_is_bound_to_another_label_is_refused(
    account: Account, other: Account, tmp_path: Path
) -> None:
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        pipeline.run(settings_for(server.url, tmp_path))
        settings = settings_for(others.url, tmp_path, key=OTHER_KEY)
        pipeline.run(settings)
        other.account = "acme"
        said = refusal(settings)
    assert "'acme'" in said
    assert "'beta'" in said


def test_a_second_key_of_another_account_is_refused(
    account: Account, other: Account, tmp_path: Path
) -> None:
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        pipeline.run(settings_for(others.url, tmp_path, key=OTHER_KEY))
        said = refusal(settings_for(server.url, tmp_path, metrics_key=OTHER_KEY))
    assert "FAL_METRICS_KEY is a key of account 'beta'" in said


@pytest.mark.parametrize("is_sandbox_first", [False, True])
def test_invented_and_real_accounts_share_no_warehouse(
    is_sandbox_first: bool, account: Account, other: Account, tmp_path: Path
) -> None:
    faults: list[Callable[[Request], Fault] | None] = [as_fal, None]
    first, second = reversed(faults) if is_sandbox_first else faults
    with (
        Sandbox(account, fault=first) as server,
        Sandbox(other, keys={OTHER_KEY: "FULL"}, fault=second) as others,
    ):
        settings = settings_for(server.url, tmp_path)
        pipeline.run(settings)
        before, landed = all_tables(settings), set(extracts.complete_reads(settings))
        horizons = ask(settings, "select * from ops.horizons", opened)
        for named in (None, "beta"):
            wrong = settings_for(others.url, tmp_path, key=OTHER_KEY, account=named)
            assert "is a sandbox" in refusal(wrong) or "of a sandbox" in refusal(wrong)
        assert all_tables(settings) == before
        assert set(extracts.complete_reads(settings)) == landed
        assert ask(settings, "select * from ops.horizons", opened) == horizons
        assert bound(settings) == {"acme": (("acme",), 1)}
        assert pipeline.run(settings).exit_code == 0


# --- The same charges under two labels ------------------------------------------------------------


@pytest.fixture
def twice(account: Account, tmp_path: Path) -> Iterator[tuple[Settings, Settings, Account]]:
    """Settings of an account that is loaded; and of another one that shares its charges of the 22nd."""
    shared = truth.two_days()
    shared.account = "beta"
    shared.lines = [one for one in account.lines if one.hour.day == 22]
    own = replace(account.lines[0], endpoint_id="fal-ai/own")
    shared.lines.append(own)
    with Sandbox(account) as server, Sandbox(shared, keys={OTHER_KEY: "FULL"}) as others:
        first = settings_for(server.url, tmp_path)
        pipeline.run(first)
        yield first, settings_for(others.url, tmp_path, key=OTHER_KEY), shared


def test_a_day_whose_requests_are_loaded_under_another_label_is_refused_and_others_load(
    twice: tuple[Settings, Settings, Account], account: Account
) -> None:
    first, second, shared = twice
    before = spent(first)
    report = pipeline.run(second)
    assert report.exit_code == 3
    refused = {(task.resource.name, task.window.day) for task, _ in report.failures if task}
    assert refused == {(name, truth.day(22)) for name in ("usage", "billing_events")}
    assert all(isinstance(error, SharedChargesError) for _, error in report.failures)
    for _, error in report.failures:
        assert "'acme'" in str(error)
        assert "'beta'" in str(error)
    assert spent(first) == before | {"beta": shared.lines[-1].cost_total}
    # and again: usage is refused by what is written down of the charges
    assert pipeline.run(second, Asked(truth.day(22), truth.day(23), ["usage"])).exit_code == 3
    assert spent(first) == before | {"beta": shared.lines[-1].cost_total}


def test_usage_alone_of_a_new_label_is_judged_by_its_charges_too(
    twice: tuple[Settings, Settings, Account],
) -> None:
    first, second, _ = twice
    before = spent(first)
    path = distributed.write_plan(second, Asked(truth.day(22), truth.day(23), ["usage"]))
    assert path is not None
    assert [one.resource for one in distributed.read_plan(path).windows] == ["billing_events", "usage"]
    for piece in distributed.chunks(path):
        assert distributed.extract_chunk(second, piece).exit_code == 0
    report = distributed.load_plan(second, path)
    assert [type(error) for _, error in report.failures] == [SharedChargesError] * 2
    assert pipeline.run(second, Asked(truth.day(22), truth.day(23), ["usage"])).exit_code == 3
    assert spent(first) == before
    assert pipeline.load(second).exit_code == 3
    build_and_publish(first, Report("again"))
    assert spent(first) == before


def test_usage_of_a_new_label_is_not_loaded_before_its_charges(
    twice: tuple[Settings, Settings, Account],
) -> None:
    _, second, _ = twice
    assert pipeline.extract(second, Asked(truth.day(21), truth.day(22))).exit_code == 0
    report = pipeline.load(second, Asked(resources=["usage"]))
    [(_, error)] = report.failures
    assert "load them first" in str(error)
    assert pipeline.load(second).exit_code == 0


TWICE = """
    select usage_date from reports.rpt_spend_daily group by usage_date having count(distinct account) > 1
"""
REFUSED = (
    "select account, resource, cast(window_start as date), error from ops.failures where account = '{}' "
    "order by all"
)
CHARGES = "/models/billing-events"


@dataclass
class Label:
    """One of several labels: what runs under it, what fal serves it, and the server that does."""

    settings: Settings
    account: Account
    server: Sandbox

    def run(self, *resources: str) -> Report:
        """What is due."""
        return pipeline.run(self.settings, Asked(resources=resources))

    def refused(self) -> set[tuple[str, date]]:
        """The windows that the ledger says are refused as those of another label."""
        found = ask(self.settings, REFUSED.format(self.account.account), opened)
        return {(name, day) for _, name, day, error in found if error == "SharedChargesError"}


Labels = dict[str, Label]


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Labels]:
    """One account of fal under two labels, of which beta reaches further back; gamma is another one."""
    monkeypatch.setattr("faletl.fal.client.TRIES", 1)
    days = [truth.day(number) for number in range(18, 27)]
    lines = [truth.line(truth.at_hour(day, hour), quantity="4") for day in days for hour in (1, 2)]
    acme = Account(lines=lines, catalogue=truth.two_days().catalogue)
    keys = {"acme": FULL_KEY, "beta": OTHER_KEY, "gamma": "third-account:0123456789abcdef"}
    found: Labels = {}
    with ExitStack() as stack:
        for name, key in keys.items():
            requests = "gamma/" if name == "gamma" else ""
            account = replace(acme, account=name, requests=requests)
            server = stack.enter_context(Sandbox(account, keys={key: "FULL"}))
            first_days = 2 if name == "acme" else 4
            settings = settings_for(server.url, tmp_path, key=key, first_days=first_days)
            found[name] = Label(settings, account, server)
        yield found


def both_of(day: date) -> set[tuple[str, date]]:
    """Charges and usage of a day."""
    return {("usage", day), ("billing_events", day)}


@pytest.mark.parametrize("order", [("acme", "beta"), ("beta", "acme")])
def test_each_day_of_an_account_is_loaded_under_one_of_its_labels_whichever_runs_first(
    order: tuple[str, str], labels: Labels, clock: time_machine.Traveller
) -> None:
    assert labels["acme"].run().exit_code == 0
    assert labels["beta"].run().exit_code == 3
    assert labels["beta"].refused() >= both_of(truth.day(22)) | both_of(truth.day(23))
    for number in (24, 25):
        clock.shift(timedelta(days=1))
        first, second = (labels[name] for name in order)
        first.run()
        assert second.run().exit_code == 3
        assert second.refused() >= both_of(truth.day(number))
        assert ask(first.settings, TWICE) == []
    days = "select distinct usage_date from reports.rpt_spend_daily order by all"
    loaded = [day for (day,) in ask(labels["acme"].settings, days)]
    assert loaded == [truth.day(number) for number in range(19, 26)]


def test_usage_alone_of_a_label_with_charges_of_its_own_is_loaded_after_its_charges(
    labels: Labels, clock: time_machine.Traveller
) -> None:
    for name in ("acme", "beta"):
        labels[name].run()
    clock.shift(timedelta(days=1))
    labels["acme"].run("usage", "billing_events")
    second = labels["beta"].settings
    path = distributed.write_plan(second, Asked(truth.day(24), truth.day(25), ["usage"]))
    assert path is not None
    assert [one.resource for one in distributed.read_plan(path).windows] == ["billing_events", "usage"]
    for piece in reversed(distributed.chunks(path)):
        distributed.extract_chunk(second, piece)
    report = distributed.load_plan(second, path)
    assert [type(error) for _, error in report.failures] == [SharedChargesError] * 2
    assert labels["beta"].run("usage").exit_code == 3
    assert ask(second, TWICE) == []


def test_a_rebuild_shows_the_days_that_are_refused_as_those_of_another_label(
    labels: Labels, clock: time_machine.Traveller
) -> None:
    labels["acme"].run()
    beta = labels["beta"]
    beta.run()
    statuses = "select account, usage_date, status, reason from reports.rpt_reconciliation order by all"
    before = beta.refused(), ask(beta.settings, statuses)
    assert any(status == "refused" for *_, status, _ in before[1])
    clock.shift(timedelta(minutes=20))
    rebuild(beta.settings)
    assert (beta.refused(), ask(beta.settings, statuses)) == before
    assert beta.run("usage").exit_code == 3
    assert ask(beta.settings, TWICE) == []


def test_a_rebuild_does_not_call_refused_what_can_be_loaded_after_its_charges(labels: Labels) -> None:
    labels["acme"].run()
    gamma = labels["gamma"].settings
    assert pipeline.extract(gamma, Asked(resources=["usage", "billing_events"])).exit_code == 0
    rebuild(gamma)
    assert labels["gamma"].refused() == set()
    assert ask(gamma, "select * from ops.failures", opened) == []
    assert pipeline.load(gamma).exit_code == 0


@pytest.mark.parametrize("is_rebuilt", [False, True])
def test_charges_that_fal_fails_to_give_open_no_way_for_the_usage_of_another_label(
    is_rebuilt: bool, labels: Labels, clock: time_machine.Traveller
) -> None:
    acme, beta = labels["acme"], labels["beta"]
    acme.run()
    beta.server.fault = refusing(503, CHARGES)
    report = beta.run()
    unknown = {task.window.day for task, error in report.failures if task and is_unknown(error)}
    assert unknown == {truth.day(number) for number in (21, 22, 23)}
    beta.server.fault = None
    beta.run()
    beta.server.fault = refusing(503, CHARGES)
    for _ in range(2):
        clock.shift(timedelta(hours=1))
        if is_rebuilt:
            rebuild(beta.settings)
        assert beta.run().exit_code == 3
        assert ask(acme.settings, TWICE) == []


def is_unknown(error: Exception) -> bool:
    """Whether usage waits for the charges that tell whose it is, and the error says so."""
    return isinstance(error, UnknownOverlapError) and "'acme'" in str(error)


@pytest.mark.parametrize("is_first_run", [False, True])
def test_usage_without_its_charges_keeps_that_of_another_label_out(
    is_first_run: bool, labels: Labels, clock: time_machine.Traveller
) -> None:
    acme, beta = labels["acme"], labels["beta"]
    if not is_first_run:
        acme.run()
        clock.shift(timedelta(days=1))
    acme.server.fault = refusing(503, CHARGES)
    assert acme.run().exit_code == 1
    report = beta.run()
    today = max(task.window.day for task, error in report.failures if task and is_unknown(error))
    assert today == truth.day(23 if is_first_run else 24)
    acme.server.fault = None
    assert acme.run().exit_code == 3
    assert beta.run().exit_code == 3
    assert ask(acme.settings, TWICE) == []


@pytest.mark.parametrize("order", [("acme", "beta"), ("beta", "acme")])
def test_charges_that_come_later_than_usage_let_no_day_in_twice(
    order: tuple[str, str], labels: Labels, clock: time_machine.Traveller
) -> None:
    for name in ("acme", "beta"):
        labels[name].run()
    clock.shift(timedelta(days=1))
    first, second = (labels[name] for name in order)
    earlier = [one for one in first.account.lines if one.hour.date() < truth.day(24)]
    first.account.events = second.account.events = truth.charges(earlier)
    report = first.run("usage", "billing_events")
    today = {one.resource: one.rows for one in report.outcomes if one.window.day == truth.day(24)}
    assert today["usage"] > 0 == today["billing_events"]
    second.run("usage", "billing_events")
    first.account.events = second.account.events = None
    for label in (second, first, second):
        clock.shift(timedelta(minutes=30))
        label.run("usage", "billing_events")
        assert ask(first.settings, TWICE) == []


def test_what_is_accepted_of_another_label_is_refused_all_the_same(labels: Labels) -> None:
    acme, beta, day = labels["acme"], labels["beta"], truth.day(22)
    for label in (acme, beta):
        account = label.account
        account.events = truth.charges(account.lines)
        account.lines = [*account.lines, truth.line(truth.at_hour(day, 5), quantity="-1")]
        pipeline.run(label.settings, Asked(day, day + timedelta(days=1), ["usage", "billing_events"]))
        if label is acme:
            accept(label.settings, "usage", day, reason="known", account="acme")
    before = all_tables(acme.settings)
    with pytest.raises(SharedChargesError, match="'acme'"):
        accept(beta.settings, "usage", day, reason="known", account="beta")
    assert all_tables(acme.settings) == before


def test_accounts_that_are_told_apart_ask_and_load_as_if_they_were_alone(
    labels: Labels, clock: time_machine.Traveller
) -> None:
    acme, gamma = labels["acme"], labels["gamma"]
    acme.run()
    assert gamma.run().exit_code == 0
    clock.shift(timedelta(days=1))
    acme.run()
    asked = len(gamma.server.requests)
    day = truth.day(24)
    report = pipeline.run(gamma.settings, Asked(day, day + timedelta(days=1), ["usage"]))
    assert [one.outcome for one in report.outcomes] == ["loaded"]
    assert CHARGES not in {request.path for request in gamma.server.requests[asked:]}
    clock.shift(timedelta(days=1))
    acme.run()
    gamma.server.fault = refusing(503, CHARGES)
    report = gamma.run("usage", "billing_events")
    assert report.exit_code == 1
    loaded = {(one.resource, one.window.day) for one in report.outcomes}
    assert ("usage", truth.day(25)) in loaded


def test_a_key_that_may_not_read_charges_keeps_no_other_account_out_and_is_refused_beside_one(
    labels: Labels, clock: time_machine.Traveller
) -> None:
    acme, gamma = labels["acme"], labels["gamma"]
    gamma.server.fault = refusing(403, CHARGES)
    assert gamma.run("usage").exit_code == 0
    assert acme.run().exit_code == 0
    assert set(spent(acme.settings)) == {"acme", "gamma"}
    before = all_tables(acme.settings)
    clock.shift(timedelta(hours=1))
    report = gamma.run("usage")
    assert report.exit_code == 2
    assert "billing" in str(report.failures[0][1])
    assert all_tables(acme.settings) == before


def test_usage_in_another_currency_needs_no_charges(labels: Labels) -> None:
    acme, gamma = labels["acme"], labels["gamma"]
    acme.run()
    gamma.account.lines = [replace(one, currency="EUR") for one in gamma.account.lines]
    assert gamma.run("usage").exit_code == 0
    assert set(spent(gamma.settings)) == {"acme", "gamma"}


def test_what_one_label_is_refused_is_loaded_of_others_that_landed(labels: Labels) -> None:
    acme = labels["acme"]
    acme.run()
    asked = Asked(truth.day(22), truth.day(23), ["usage", "billing_events"])
    for name in ("beta", "gamma"):
        assert pipeline.extract(labels[name].settings, asked).exit_code == 0
    report = pipeline.load(acme.settings)
    assert {error.facts["account"] for _, error in report.failures} == {"beta"}
    assert labels["beta"].refused() == both_of(truth.day(22))
    held = "select distinct _account from raw.usage order by all"
    assert ask(acme.settings, held, opened) == [("acme",), ("gamma",)]


def test_a_request_under_two_labels_fails_the_build_and_says_what_helps(
    account: Account, settings: Settings
) -> None:
    pipeline.run(settings)
    with opened(settings) as connection:
        names = "_load_id, _page, _row, _ordinal, request_id, endpoint_id, timestamp, cost_total"
        connection.execute(
            f"insert into raw.billing_events (_account, _hash, {names}) "
            f"select 'twin', 'x' || _hash, {names} from raw.billing_events"
        )
        connection.execute(
            "insert into ops.loads "
            "(load_id, account, resource, window_start, rows, cost_total, is_current) "
            "select 'x' || load_id, 'twin', resource, window_start, rows, cost_total, is_current "
            "from ops.loads where resource = 'billing_events'"
        )
    with pytest.raises(CheckFailedError, match="faletl accounts forget") as caught:
        pipeline.build(settings, full=True)
    assert "requests_are_of_one_account" in str(caught.value)


# --- Renaming and forgetting ----------------------------------------------------------------------


def test_a_renamed_account_is_the_one_that_was_loaded_under_that_label(
    account: Account, sandbox: Sandbox, settings: Settings, tmp_path: Path
) -> None:
    account.lines.append(account.lines[0])  # charges that are exact twins
    pipeline.run(settings)
    assert rename(settings, "acme", "emea").published
    (tmp_path / "fresh").mkdir()
    fresh = settings_for(sandbox.url, tmp_path / "fresh", account="emea")
    pipeline.run(fresh)
    assert all_tables(settings) == all_tables(fresh)
    digests = "select resource, window_start, digest from ops.loads order by all"
    assert ask(settings, digests, opened) == ask(fresh, digests, opened)
    assert verify(settings).findings == []
    for column in (
        "ops.loads.account",
        "ops.horizons.account",
        "raw.usage._account",
        "ops.accounts.account",
    ):
        schema, table, name = column.split(".")
        assert ask(settings, f"select distinct {name} from {schema}.{table}", opened) == [("emea",)]
    report = pipeline.run(settings, Asked(truth.day(21), truth.day(23), ["usage", "billing_events"]))
    assert {one.outcome for one in report.outcomes} == {"unchanged"}
    assert report.account == "emea"


def test_a_rename_survives_a_rebuild_with_its_horizons_and_keys(
    account: Account, settings: Settings, sandbox: Sandbox, clock: time_machine.Traveller
) -> None:
    pipeline.run(settings)
    rename(settings, "acme", "emea")
    account.lines[0] = replace(account.lines[0], quantity=account.lines[0].quantity + 1)
    clock.shift(timedelta(hours=1))
    pipeline.run(settings, Asked(truth.day(20), truth.day(23)))
    before, decided = all_tables(settings), what_was_decided(settings)
    rebuild(settings)
    assert all_tables(settings) == before
    assert what_was_decided(settings) == decided
    sandbox.fault = refusing()
    assert pipeline.run(settings).account == "emea"
    assert verify(settings).findings == []


@pytest.fixture
def second(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of another warehouse of the same landing folder, loaded as the first one is."""
    (tmp_path / "second").mkdir()
    second = settings_for(settings.api_url, tmp_path / "second", landing=settings.landing)
    pipeline.run(settings)
    pipeline.run(second)
    return second


def held_labels(settings: Settings) -> set[str]:
    """Of all that is loaded, and of the accounts that are known."""
    query = (
        "select account from ops.loads union select _account from raw.usage "
        "union select account from ops.accounts"
    )
    return {label for (label,) in ask(settings, query, opened)}


def test_a_rename_in_one_warehouse_mixes_no_labels_in_another(
    settings: Settings, second: Settings, clock: time_machine.Traveller
) -> None:
    rename(settings, "acme", "emea")
    before = all_tables(second)
    cure = "has renamed or forgotten the account 'acme'; run faletl rebuild to apply that here, too"
    for refused in (
        lambda: rebuild(second, truth.day(21)),
        lambda: pipeline.load(second),
        lambda: prune(second),
        lambda: rename(second, "acme", "apac"),
    ):
        with pytest.raises(UsageError, match=cure):
            refused()
    clock.shift(timedelta(hours=1))
    pipeline.run(second)
    assert held_labels(second) == {"acme"}
    assert all_tables(second)["reports.rpt_spend_daily"] == before["reports.rpt_spend_daily"]
    rebuild(second)
    assert held_labels(second) == {"emea"}
    rebuild(second, truth.day(21))
    assert pipeline.run(second).account == "emea"
    assert held_labels(settings) == {"emea"}
    rename(second, "emea", "acme")
    assert held_labels(second) == {"acme"}


def test_an_account_that_one_warehouse_forgot_stays_in_another_until_it_is_rebuilt(
    settings: Settings, second: Settings
) -> None:
    before = all_tables(second)
    forget(settings, "acme")
    prune(settings)
    assert verify(second).findings == []
    assert all_tables(second) == before
    rebuild(second)
    assert held_labels(second) == set()


def test_a_day_of_a_renamed_account_is_made_again_from_its_older_pages(settings: Settings) -> None:
    pipeline.run(settings)
    rename(settings, "acme", "emea")
    before = all_tables(settings)
    assert rebuild(settings, truth.day(21)).exit_code == 0
    assert all_tables(settings) == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("nobody", "x", "there is no account 'nobody'"),
        ("acme", "beta", "there is already an account 'beta'"),
        ("acme", "acme", "there is already an account 'acme'"),
        ("acme", "a\nb", "cannot be a label"),
        ("acme", " ", "cannot be a label"),
        ("acme", "sha256$1$2", "cannot be a label"),
    ],
)
def test_a_rename_that_cannot_be_meant_is_refused(
    old: str, new: str, said: str, account: Account, other: Account, tmp_path: Path
) -> None:
    everything = Asked(truth.day(21), truth.day(22), ["usage"])
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        settings = settings_for(server.url, tmp_path)
        pipeline.run(settings, everything)
        pipeline.run(settings_for(others.url, tmp_path, key=OTHER_KEY), everything)
    before = all_tables(settings)
    with pytest.raises(UsageError, match=said):
        rename(settings, old, new)
    assert all_tables(settings) == before
    assert set(bound(settings)) == {"acme", "beta"}


def test_a_rename_that_is_killed_is_done_or_not_and_the_next_run_publishes_it(
    account: Account, settings: Settings
) -> None:
    pipeline.run(settings)
    before = all_tables(settings)
    command = "accounts rename acme emea"
    for trap in (
        Trap("faletl.operations.rename._rehash"),
        Trap("faletl.landing.decisions.record", "before"),
    ):
        assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
        assert all_tables(settings) == before
        assert set(bound(settings)) == {"acme"}
    trap = Trap("faletl.operations.rename.build_and_publish", "before")
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    assert set(bound(settings)) == {"emea"}
    assert pipeline.run(settings).exit_code == 0
    assert spent(settings) == {"emea": sum(one.cost_total for one in account.lines)}
    assert verify(settings).findings == []


def test_what_is_under_way_while_its_account_is_renamed_writes_nothing(settings: Settings) -> None:
    pipeline.run(settings)
    path = distributed.write_plan(settings, Asked(truth.day(21), truth.day(22), ["usage"]))
    assert path is not None
    for piece in distributed.chunks(path):
        distributed.extract_chunk(settings, piece)
    rename(settings, "acme", "emea")
    before = all_tables(settings)
    with pytest.raises(LeaseLostError, match="'acme' was renamed or forgotten"):
        distributed.load_plan(settings, path)
    assert all_tables(settings) == before
    assert pipeline.load(settings).exit_code == 0  # under its label of today
    assert all_tables(settings) == before


def test_a_label_that_is_free_again_is_another_accounts(
    account: Account, other: Account, tmp_path: Path, clock: time_machine.Traveller
) -> None:
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        first = settings_for(server.url, tmp_path)
        pipeline.run(first)
        clock.shift(timedelta(minutes=1))
        rename(first, "acme", "emea")
        clock.shift(timedelta(minutes=1))
        pipeline.run(settings_for(others.url, tmp_path, key=OTHER_KEY, account="acme"))
    expected = {"emea": costs(account)["acme"], "acme": costs(other)["beta"]}
    assert spent(first) == expected
    rebuild(first)
    assert spent(first) == expected
    assert verify(first).findings == []


@pytest.fixture
def both(account: Account, other: Account, tmp_path: Path) -> Iterator[tuple[Settings, Settings]]:
    """Settings of two accounts of one warehouse, both loaded."""
    with Sandbox(account) as server, Sandbox(other, keys={OTHER_KEY: "FULL"}) as others:
        first = settings_for(server.url, tmp_path)
        second = settings_for(others.url, tmp_path, key=OTHER_KEY)
        pipeline.run(first)
        pipeline.run(second)
        yield first, second


def test_a_forgotten_account_is_gone_from_every_table_and_stays_gone(
    both: tuple[Settings, Settings], account: Account, clock: time_machine.Traveller
) -> None:
    settings, _ = both
    clock.shift(timedelta(minutes=1))
    found = extent(settings, "beta")
    assert (found.first_day, found.last_day) == (truth.day(21), truth.day(23))
    assert found.rows > len(account.lines[:5])
    forget(settings, "beta")
    for again in (None, rebuild, pipeline.load, pipeline.run):
        if again is not None:
            assert again(settings).exit_code == 0
        assert spent(settings) == costs(account)
        for table, rows in all_tables(settings).items():
            assert not [row for row in rows if "beta" in row], table
        for table in ("loads", "accounts", "horizons", "validations", "unknown_endpoints"):
            labels = f"select count(*) from ops.{table} where account = 'beta'"
            assert ask(settings, labels, opened) == [(0,)], table
    dropped, _ = prune(settings)
    assert {folder.parents[2].name for folder in dropped} >= {"beta"}
    assert not list(Path(settings.landing).glob("beta/*/*/*/manifest.json"))
    assert verify(settings).findings == []


def test_an_account_that_was_forgotten_by_mistake_can_be_extracted_again(
    both: tuple[Settings, Settings], clock: time_machine.Traveller
) -> None:
    first, second = both
    before = spent(first)
    clock.shift(timedelta(minutes=1))
    forget(first, "beta")
    for step, settings in ((pipeline.run, second), (rebuild, first)):
        clock.shift(timedelta(minutes=1))
        assert step(settings).exit_code == 0
    assert spent(first) == before
    with pytest.raises(UsageError, match="there is no account 'gamma'"):
        forget(first, "gamma")


def test_a_forget_that_is_killed_is_done_or_not_and_the_next_build_makes_all_of_it(
    both: tuple[Settings, Settings], account: Account
) -> None:
    settings, _ = both
    before = all_tables(settings)
    command = "accounts forget beta --yes"
    trap = Trap("faletl.landing.decisions.record", "before")
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    assert all_tables(settings) == before
    trap = Trap("faletl.operations.rename.build_and_publish", "before")
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    build_and_publish(settings, Report("next"), builds="behind")
    assert spent(settings) == costs(account)
    assert verify(settings).findings == []


def test_accounts_of_a_warehouse_that_is_not_there_are_none(tmp_path: Path) -> None:
    settings = settings_for("http://127.0.0.1:9", tmp_path)
    with pytest.raises(UsageError, match="there is no account yet"):
        rename(settings, "a", "b")
    with pytest.raises(UsageError, match="there is no account yet"):
        forget(settings, "a")


def test_a_run_says_at_once_which_key_is_not_bound(
    settings: Settings, sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pipeline.run(settings)
    pipeline.run(settings_for(sandbox.url, tmp_path, key=READONLY_KEY), Asked(resources=["credits"]))
    assert any("the key is not bound to account 'acme'" in one.getMessage() for one in caplog.records)
