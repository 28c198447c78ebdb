"""Accounts: whose a key is, what contradicts it, two labels for one account, renaming and forgetting."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import time_machine

from faletl import landing, pieces, pipeline
from faletl.accounts import known_accounts
from faletl.config import Settings
from faletl.decisions import AccountBound, recorded
from faletl.errors import CheckFailedError, LeaseLostError, UsageError
from faletl.invented import HEADER
from faletl.overlap import SharedChargesError
from faletl.plan import Asked
from faletl.rebuild import prune, rebuild
from faletl.rename import extent, forget, rename
from faletl.sandbox import FULL_KEY, READONLY_KEY, Fault, Request, Sandbox
from faletl.verify import verify
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


def refusal(settings: Settings, asked: Asked = pipeline.DUE) -> str:
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
    assert told == [["fal calls the account 'acme' now 'acme-inc'; it keeps its label 'acme'"], []]
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
    monkeypatch.setattr("faletl.client.TRIES", 1)
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
    monkeypatch.setattr("faletl.client.TRIES", 1)
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
        for asked in (pipeline.DUE, Asked(truth.day(21), truth.day(23))):
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
        before, landed = all_tables(settings), set(landing.complete_reads(settings))
        horizons = ask(settings, "select * from ops.horizons", opened)
        for named in (None, "beta"):
            wrong = settings_for(others.url, tmp_path, key=OTHER_KEY, account=named)
            assert "is a sandbox" in refusal(wrong) or "of a sandbox" in refusal(wrong)
        assert all_tables(settings) == before
        assert set(landing.complete_reads(settings)) == landed
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
    path = pieces.make_plan(second, Asked(truth.day(22), truth.day(23), ["usage"]))
    assert path is not None
    assert [one.resource for one in pieces.read_plan(path).windows] == ["billing_events", "usage"]
    for piece in pieces.pieces(path):
        assert pieces.extract_piece(second, piece).exit_code == 0
    report = pieces.load_plan(second, path)
    assert [type(error) for _, error in report.failures] == [SharedChargesError] * 2
    assert pipeline.run(second, Asked(truth.day(22), truth.day(23), ["usage"])).exit_code == 3
    assert spent(first) == before
    assert pipeline.load(second).exit_code == 3
    pipeline.build_and_publish(first, pipeline.Report("again"))
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


def labels(settings: Settings) -> set[str]:
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
    cure = "has renamed or forgotten the account 'acme'; faletl rebuild makes this one follow"
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
    assert labels(second) == {"acme"}
    assert all_tables(second)["reports.rpt_spend_daily"] == before["reports.rpt_spend_daily"]
    rebuild(second)
    assert labels(second) == {"emea"}
    rebuild(second, truth.day(21))
    assert pipeline.run(second).account == "emea"
    assert labels(settings) == {"emea"}
    rename(second, "emea", "acme")
    assert labels(second) == {"acme"}


def test_an_account_that_one_warehouse_forgot_stays_in_another_until_it_is_rebuilt(
    settings: Settings, second: Settings
) -> None:
    before = all_tables(second)
    forget(settings, "acme")
    prune(settings)
    assert verify(second).findings == []
    assert all_tables(second) == before
    rebuild(second)
    assert labels(second) == set()


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
        ("acme", "beta", "there is an account 'beta' already"),
        ("acme", "acme", "there is an account 'acme' already"),
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
    for trap in (Trap("faletl.rename._rehash"), Trap("faletl.decisions.record", "before")):
        assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
        assert all_tables(settings) == before
        assert set(bound(settings)) == {"acme"}
    trap = Trap("faletl.pipeline.build_and_publish", "before")
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    assert set(bound(settings)) == {"emea"}
    assert pipeline.run(settings).exit_code == 0
    assert spent(settings) == {"emea": sum(one.cost_total for one in account.lines)}
    assert verify(settings).findings == []


def test_what_is_under_way_while_its_account_is_renamed_writes_nothing(settings: Settings) -> None:
    pipeline.run(settings)
    path = pieces.make_plan(settings, Asked(truth.day(21), truth.day(22), ["usage"]))
    assert path is not None
    for piece in pieces.pieces(path):
        pieces.extract_piece(settings, piece)
    rename(settings, "acme", "emea")
    before = all_tables(settings)
    with pytest.raises(LeaseLostError, match="'acme' was renamed or forgotten"):
        pieces.load_plan(settings, path)
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
    trap = Trap("faletl.decisions.record", "before")
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    assert all_tables(settings) == before
    trap = Trap("faletl.pipeline.build_and_publish", "before")
    assert start(settings, trap, command=command).finish()[0] == -signal.SIGKILL
    pipeline.build_and_publish(settings, pipeline.Report("next"), builds="behind")
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
