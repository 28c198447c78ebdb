"""Whatever fal does: readers keep what they had, a sentence says what it was, the next run mends it."""

from __future__ import annotations

import gzip
import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import CircuitOpenError
from faletl.fal import client as client_module
from faletl.fal.limiter import MAX_FAILURES
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import all_tables, ask, opened, published_path, settings_for, total
from tests.integration.test_cli import faletl
from tests.servers import free_ports
from tests.truth import Account

USAGE_22 = Asked(truth.day(22), truth.day(23), ["usage"])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "TRIES", 2)


def rows(**changed: Any) -> bytes:
    """A page with a row that the account does not have, and that may be broken in these fields."""
    row = {
        "endpoint_id": "x/new", "unit": "images", "quantity": 1, "unit_price": 1, "cost_total": 1,
        "currency": "USD", **changed,
    }  # fmt: skip
    series = [{"bucket": "2026-11-22T05:00:00Z", "results": [row]}]
    return json.dumps({"time_series": series, "next_cursor": None, "has_more": False}).encode()


WHOLE = rows()
ENVELOPE = b'{"error":{"message":"\\u001b[31mbroken\\n2026 INFO all is well"}}'


FAULTS: dict[str, tuple[Fault, int]] = {
    "reset": (Fault(drop=True), 1),
    "429 for a long time": (Fault(status=429, headers={"retry-after": "99999999999"}), 1),
    "gzip without its end": (
        Fault(headers={"content-encoding": "gzip"}, body=gzip.compress(WHOLE)[:-5]),
        3,
    ),
    "error with status 200": (Fault(body=ENVELOPE), 3),
    "bad parameter": (Fault(status=422, body=ENVELOPE), 3),
    "redirect": (Fault(status=302, headers={"location": "http://127.0.0.1:9/"}), 3),
    "more, but no cursor": (Fault(body=WHOLE.replace(b"false", b"true")), 3),
    "NUL": (Fault(body=rows(endpoint_id="a\0")), 3),
    "an id of a megabyte": (Fault(body=rows(endpoint_id="x" * 2**20)), 3),
    "too many fields": (Fault(body=rows(**{f"n{n}": n for n in range(100_000)})), 3),
    "other rows than fal adds up": (Fault(body=WHOLE), 3),
    "revoked key": (Fault(status=401), 2),
}


def test_a_run_that_only_failed_leaves_all_as_it_was_and_the_next_one_mends_it(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = truth.two_days()
    broken: list[Fault] = []

    def fault(request: Request) -> Fault | None:
        is_rows = request.path == "/models/usage" and request.query.get("expand") != ["summary"]
        return broken[-1] if broken and is_rows else None

    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, tmp_path, account="acme")
        assert pipeline.run(settings, Asked(truth.day(21), truth.day(23))).exit_code == 0
        before, held = spend(settings), ask(settings, HELD, opened)
        for name, (broken_by, code) in FAULTS.items():
            broken.append(broken_by)
            was_shown = readers_copy(settings)
            report = pipeline.run(settings, USAGE_22)
            assert report.exit_code == code, name
            if code == 3:  # that the day is refused is news to reports, its spend is not
                is_refused = ask(settings, REFUSED)
                assert is_refused == [("refused",)], name
            else:
                assert (report.build, report.published) == (None, None), name
                assert readers_copy(settings) == was_shown, name
            assert spend(settings) == before, name
            assert ask(settings, HELD, opened) == held, name
            [(_, error)] = report.failures
            check_sentence(str(error), name)
        refused = settings.model_copy(update={"api_url": f"http://127.0.0.1:{free_ports(1)[0]}/v1"})
        report = pipeline.run(refused, USAGE_22)
        assert report.exit_code == 1
        assert "refused" in str(report.failures[0][1])

        broken.clear()
        assert ask(settings, "select count(*) from ops.failures", opened) == [(1,)]
        account.lines.append(truth.line(account.lines[-1].hour, "x/late", "3"))
        assert pipeline.run(settings, USAGE_22).exit_code == 0
    assert total(settings) == sum(one.cost_total for one in account.lines)
    assert ask(settings, "select count(*) from ops.failures") == [(0,)]
    assert ask(settings, "select count(*) from ops.quarantine where resolved_at is null") == [(0,)]


HELD = "select count(*), sum(cost_total), min(_load_id), max(_load_id) from raw.usage"


REFUSED = (
    "select distinct status from reports.rpt_reconciliation where usage_date = '2026-11-22' "
    "and reason like 'usage%'"
)


def test_a_newer_snapshot_ends_what_failed_of_earlier_ones(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.list_price(truth.FLUX, "0.025")
    sandbox.fault = lambda request: Fault(status=400) if request.path == "/models/pricing" else None
    assert pipeline.run(settings).exit_code == 3
    sandbox.fault = None
    clock.shift(timedelta(days=1))
    assert pipeline.run(settings).exit_code == 0
    assert ask(settings, "select count(*) from ops.failures", opened) == [(0,)]
    open_ones = "select subject from ops.alerts where resolved_at is null"
    assert ask(settings, open_ones, opened) == []


def spend(settings: Settings) -> object:
    """All that readers have but for what is known of refused days."""
    tables = all_tables(settings)
    return {name: rows for name, rows in tables.items() if name != "reports.rpt_reconciliation"}


def readers_copy(settings: Settings) -> object:
    """What readers have: byte for byte where it is a file."""
    if settings.warehouse.startswith("duckdb:"):
        return published_path(settings).read_bytes()
    return all_tables(settings)


ADVICE = re.compile(
    "try again later|run again|check FAL_KEY|quarantine list|is not loaded|fetches the window again"
)


def check_sentence(sentence: str, name: str) -> None:
    """It names the place and what to do, and holds nothing that could forge a line of a log."""
    assert sentence.startswith("usage, window 2026-11-22"), sentence
    assert ADVICE.search(sentence), sentence
    assert sentence.isprintable(), sentence
    assert sentence.isascii(), sentence
    assert len(sentence) < 800, sentence
    assert ("(fal request " in sentence) == (name != "reset"), sentence


# --- When fal is gone -----------------------------------------------------------------------------

A_WEEK = Asked(truth.day(15), truth.day(23), ["usage", "billing_events", "models"])


@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(status=429), Fault(drop=True)], ids=["503", "429", "reset"]
)
def test_a_fal_that_dies_in_a_run_is_asked_some_times_more_and_what_was_fetched_is_loaded(
    fault: Fault, clock: time_machine.Traveller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TRIES", 6)
    account = truth.two_days()
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path)
        server.fault = lambda _: fault if len(server.requests) > 10 else None
        report = pipeline.run(settings, A_WEEK)
        assert 10 + MAX_FAILURES <= len(server.requests) < 10 + MAX_FAILURES + settings.parallel
        assert report.exit_code == 1
        loaded = [one for one in report.outcomes if one.outcome == "loaded"]
        assert loaded
        failed = [task for task, _ in report.failures if task]
        assert len(loaded) + len(failed) == 2 * 8 + 1
        stopped = {error.message for _, error in report.failures if isinstance(error, CircuitOpenError)}
        assert len(stopped) == 1
        assert report.published
        recorded = "select count(*) from ops.failures where error = 'CircuitOpenError'"
        assert ask(settings, recorded)[0][0] >= len(failed) - 3
        # A window that was never asked for leaves no folder behind.
        folders = [path for path in (tmp_path / "landing").rglob("2026*Z-*") if path.is_dir()]
        assert len(folders) <= len(loaded) + 2 * settings.parallel

        server.fault = None
        server.requests.clear()
        assert pipeline.run(settings, A_WEEK).exit_code == 0
    assert ask(settings, "select count(*) from ops.failures") == [(0,)]
    assert total(settings) == sum(one.cost_total for one in account.lines)


def test_a_failure_of_many_windows_is_one_line_with_their_number_the_first_and_the_last(
    tmp_path: Path,
) -> None:
    def break_all(request: Request) -> Fault | None:
        # The question that binds the key asks for one row.
        is_of_day = request.path == "/models/usage" and "limit" not in request.query
        return Fault(status=429, headers={"retry-after": "9999"}) if is_of_day else None

    with Sandbox(truth.two_days(), fault=break_all) as server:
        settings = settings_for(server.url, tmp_path, first_days=5, parallel=1)
        named = ("run", "--start", "2026-11-15", "--end", "2026-11-20", "--resource", "usage")
        text = faletl(*named, settings=settings, folder=tmp_path)
        told = faletl("--log-format", "json", *named, settings=settings, folder=tmp_path)
        status = faletl("status", settings=settings, folder=tmp_path)
    assert (text.returncode, told.returncode, status.returncode) == (1, 1, 0)
    (line,) = [one for one in text.stderr.splitlines() if one.startswith("faletl:")]
    assert line.startswith(
        "faletl: 5 windows, usage 2026-11-15 to usage 2026-11-19: faletl stopped asking fal: the last "
        "try failed; fal answered 429 to /models/usage: "
    )
    assert re.search(r"it asks for a retry in 9999 s \(20\d\d-\d\d-\d\dT[\d:]+Z\)", line)
    last = json.loads(told.stderr.splitlines()[-1])
    assert (last["error"], last["windows"], last["first"], last["last"], last["retry_after"]) == (
        "CircuitOpenError", 5, "usage 2026-11-15", "usage 2026-11-19", 9999,
    )  # fmt: skip
    (line,) = [one for one in status.stdout.splitlines() if one.startswith("failed ")]
    assert "5 windows, usage 2026-11-15T00:00:00Z to usage 2026-11-19T00:00:00Z: " in line


# --- When fal locked the account ------------------------------------------------------------------

LOCKED = Fault(
    status=403,
    body=b'{"detail":"User is locked. Reason: Exhausted balance. Top up your balance at fal.ai."}',
)
FAILURES = "select account, resource, error, message from ops.failures"


@pytest.mark.parametrize("path", ["/account/billing", "/models/usage", "/models/analytics"])
def test_a_locked_account_ends_the_run_and_is_said_until_it_is_open_again(
    path: str, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = truth.two_days()
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path)
        assert pipeline.run(settings).exit_code == 0
        server.fault = lambda request: LOCKED if request.path == path else None
        clock.shift(timedelta(hours=1))
        server.requests.clear()
        report = pipeline.run(settings)
        assert report.exit_code == 2
        [(_, error)] = report.failures
        assert type(error).__name__ == "AccountLockedError"
        assert "Top up your balance" in str(error)
        assert "another key will not help" in str(error)
        assert sum(one.path == path for one in server.requests) <= settings.parallel
        [(owner, resource, kind, message)] = ask(settings, FAILURES, opened)
        assert (owner, resource, kind) == ("acme", "usage", "AccountLockedError")
        assert message == str(error)
        assert str(error) in faletl("status", settings=settings, folder=tmp_path).stdout

        server.fault = None
        clock.shift(timedelta(hours=1))
        assert pipeline.run(settings).exit_code == 0
    assert ask(settings, FAILURES, opened) == []


def test_an_account_that_was_always_locked_leaves_no_account_behind(tmp_path: Path) -> None:
    with Sandbox(truth.two_days(), fault=lambda _: LOCKED) as server:
        settings = settings_for(server.url, tmp_path)
        report = pipeline.run(settings)
        assert (report.exit_code, len(server.requests)) == (2, 1)
    assert ask(settings, "select count(*) from ops.accounts", opened) == [(0,)]
    assert ask(settings, "select count(*) from ops.failures", opened) == [(0,)]
