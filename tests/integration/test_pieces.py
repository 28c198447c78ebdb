"""The line in pieces, as workers of a scheduler take it: the same tables as one run leaves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import AccountLockedError, KeyRefusedError, TamperedError
from faletl.landing.extracts import complete_reads
from faletl.line import distributed
from faletl.line.release import build_and_publish
from faletl.line.report import Report
from faletl.resources import RESOURCES
from faletl.sandbox import FULL_KEY, Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import all_tables, ask, opened, settings_for
from tests.truth import Account, line

pytestmark = pytest.mark.usefixtures("clock")

IN_ORDER = ("usage", "billing_events", "credits", "models", "prices", "analytics")
MANY = 120
"""Endpoints: three batches of ids to ask for."""


@pytest.fixture
def account() -> Account:
    """So many endpoints that prices and analytics need several calls."""
    account = truth.two_days()
    at = datetime(2026, 11, 21, 5, tzinfo=UTC)
    for number in range(MANY):
        endpoint_id = f"acme/model-{number:03}"
        account.lines.append(line(at + timedelta(hours=number % 30), endpoint_id, "1", "0.01"))
        account.list_price(endpoint_id, "0.01")
        account.catalogue.append({"endpoint_id": endpoint_id})
    return account


@pytest.fixture
def sandbox(account: Account) -> Iterator[Sandbox]:
    """The account, served in pages as large as fal's."""
    with Sandbox(account) as server:
        yield server


def in_pieces(settings: Settings, asked: Asked, most: int = distributed.MAX_CHUNKS) -> None:
    """The whole line, resource by resource, as the DAGs order it."""
    for name in asked.resources or IN_ORDER:
        path = distributed.write_plan(settings, Asked(asked.start, asked.end, [name]))
        assert path is not None
        for batch in distributed.batches(path):
            assert distributed.ask_batch(settings, batch)
        for piece in distributed.chunks(path, most):
            assert distributed.extract_chunk(settings, piece).exit_code == 0
        assert distributed.load_plan(settings, path).exit_code == 0
    build_and_publish(settings, Report("build"))


@pytest.mark.parametrize(
    ("asked", "most"),
    [(Asked(), 1), (Asked(date(2026, 11, 21), date(2026, 11, 23)), distributed.MAX_CHUNKS)],
    ids=["due", "named"],
)
def test_the_line_in_pieces_leaves_the_tables_of_one_run(
    asked: Asked, most: int, sandbox: Sandbox, tmp_path: Path
) -> None:
    whole, cut = (settings_for(sandbox.url, tmp_path / name) for name in ("whole", "cut"))
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()

    assert pipeline.run(whole, asked).exit_code == 0
    in_pieces(cut, asked, most)

    assert all_tables(cut) == all_tables(whole)


def test_what_batches_asked_ahead_is_not_asked_again(settings: Settings, sandbox: Sandbox) -> None:
    pipeline.run(settings, Asked(resources=["usage", "models"]))
    path = distributed.write_plan(settings, Asked(resources=["prices"]))
    assert path is not None
    batches = distributed.batches(path)
    assert len(batches) == 3
    for batch in batches:
        distributed.ask_batch(settings, batch)
    asked = Counter(request.path for request in sandbox.requests)

    (piece,) = distributed.chunks(path)
    distributed.extract_chunk(settings, piece)

    # VIDEO is used and has no price: fal answers 404 to its batch, which is halved again.
    halved = [r for r in sandbox.requests[sum(asked.values()) :] if r.path == "/models/pricing"]
    assert {request.status for request in halved} == {404}
    assert len(batches) + len(halved) < asked["/models/pricing"]


def test_a_batch_that_was_asked_is_not_asked_again_by_a_retry(
    settings: Settings, sandbox: Sandbox
) -> None:
    pipeline.run(settings, Asked(resources=["usage"]))
    path = distributed.write_plan(settings, Asked(resources=["analytics"]))
    assert path is not None
    batch = distributed.batches(path)[0]
    distributed.ask_batch(settings, batch)
    asked = len(sandbox.requests)

    distributed.ask_batch(settings, batch)

    assert len(sandbox.requests) == asked


def test_without_batches_asked_ahead_a_window_is_read_all_the_same(settings: Settings) -> None:
    pipeline.run(settings, Asked(resources=["usage", "models"]))
    path = distributed.write_plan(settings, Asked(resources=["prices"]))
    assert path is not None
    distributed.ask_batch(
        settings, distributed.batches(path)[1]
    )  # the others were lost with their worker

    (piece,) = distributed.chunks(path)
    assert distributed.extract_chunk(settings, piece).exit_code == 0

    assert distributed.load_plan(settings, path).outcomes[0].rows == MANY + 2


def test_a_retry_takes_windows_that_landed_as_read_and_fetches_the_others(
    account: Account, tmp_path: Path
) -> None:
    is_out = True

    def fault(request: Request) -> Fault | None:
        is_second_day = "2026-11-22T00:00:00Z" in request.query.get("start", [])
        return Fault(status=400) if is_out and is_second_day else None

    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        path = distributed.write_plan(settings, Asked(resources=["usage"]))
        assert path is not None
        (piece,) = distributed.chunks(path, most=1)
        first = distributed.extract_chunk(settings, piece)
        assert [str(task.window) for task, _ in first.failures if task] == ["2026-11-22"]
        landed, is_out = set(complete_reads(settings)), False

        assert distributed.extract_chunk(settings, piece).exit_code == 0

    again = set(complete_reads(settings))
    assert landed < again
    assert len(again) == len(landed) + 1
    assert {o.outcome for o in distributed.load_plan(settings, path).outcomes} == {"loaded"}


def test_what_landed_is_loaded_though_another_piece_never_ran(settings: Settings) -> None:
    path = distributed.write_plan(settings, Asked(resources=["usage"]))
    assert path is not None
    first, *_ = distributed.chunks(path)
    distributed.extract_chunk(settings, first)

    loaded = distributed.load_plan(settings, path)

    assert [str(outcome.window) for outcome in loaded.outcomes] == ["2026-11-21"]


def test_a_plan_holds_neither_key_nor_rows_and_pieces_cover_it_once(
    settings: Settings, tmp_path: Path
) -> None:
    days = Asked(date(2026, 8, 1), date(2026, 11, 1), ["usage"])
    path = distributed.write_plan(settings, days)
    assert path is not None

    cut = distributed.chunks(path)

    assert len(cut) <= distributed.MAX_CHUNKS
    covered = [number for piece in cut for number in range(piece["first"], piece["end"])]
    assert covered == list(range(92))
    assert cut[0]["windows"] == "usage 2026-08-01 to 2026-08-04"
    assert len(json.dumps(cut)) < 10_000
    assert str(settings.key_for()).partition(":")[2] not in Path(path).read_text()


def test_nothing_due_makes_no_plan(settings: Settings) -> None:
    pipeline.run(settings)
    assert distributed.write_plan(settings, Asked(resources=["models"])) is None


def test_a_first_read_by_hand_is_of_what_is_due(settings: Settings) -> None:
    today = Asked(date(2026, 11, 23), resources=["usage"])
    path = distributed.write_plan(settings, today, is_first_due=True)
    assert path is not None
    assert len(distributed.read_plan(path).windows) == 3
    distributed.extract_chunk(settings, distributed.chunks(path, most=1)[0])
    distributed.load_plan(settings, path)

    path = distributed.write_plan(settings, today, is_first_due=True)
    assert path is not None
    assert [one.start.day for one in distributed.read_plan(path).windows] == [23]


def test_a_snapshot_by_hand_is_taken_though_the_day_has_one(settings: Settings) -> None:
    pipeline.run(settings, Asked(resources=["models"]))
    assert distributed.write_plan(
        settings, Asked(date(2026, 11, 23), resources=["models"]), is_first_due=True
    )


def test_many_windows_are_spread_without_batches(settings: Settings) -> None:
    pipeline.run(settings, Asked(date(2026, 11, 21), date(2026, 11, 22), ["usage"]))
    days = Asked(date(2026, 11, 8), date(2026, 11, 23), ["analytics"])
    path = distributed.write_plan(settings, days)
    assert path is not None
    made = distributed.read_plan(path)
    some = made.windows[-1]
    assert distributed.batches(path)
    Path(path).write_bytes(msgspec.json.encode(msgspec.structs.replace(made, windows=[some] * 30)))
    assert distributed.batches(path) == []


def test_a_key_that_fal_accepts_for_nothing_is_told_when_it_plans(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path, key="unknown:0123456789abcdef")
    with pytest.raises(KeyRefusedError, match=r"fal refused the key .*check FAL_KEY"):
        distributed.write_plan(settings, Asked(resources=["usage"]))


def test_a_plan_needs_no_permission_that_its_resources_do_not_need(tmp_path: Path) -> None:
    metrics = "metrics-only:0123456789abcdef"
    days = Asked(truth.day(21), truth.day(23), ["analytics"])
    keys = {FULL_KEY: "FULL", metrics: "models:metrics:read"}
    with Sandbox(truth.two_days(), keys=keys) as server:
        settings = settings_for(server.url, tmp_path)
        pipeline.run(settings)  # binds the account
        label = settings.model_copy(update={"key": SecretStr(metrics), "account": "acme"})
        assert distributed.write_plan(label, days) is not None


def test_a_worker_that_does_not_see_the_landing_folder_says_so(settings: Settings) -> None:
    with pytest.raises(TamperedError, match="make sure that all workers have the same FALETL_LANDING"):
        distributed.read_plan("/nowhere/plan.json")
    assert settings.landing


def test_every_resource_can_be_taken_in_pieces() -> None:
    assert set(IN_ORDER) == set(RESOURCES)


@pytest.mark.parametrize("path", ["/account/billing", "/models/usage"])
def test_a_locked_account_ends_a_piece_and_is_recorded(
    path: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    days = Asked(truth.day(21), truth.day(23), ["usage"])
    in_usage = distributed.write_plan(settings, days)
    assert in_usage is not None
    assert distributed.extract_chunk(settings, distributed.chunks(in_usage)[0]).exit_code == 0
    assert distributed.load_plan(settings, in_usage).exit_code == 0
    locked = Fault(status=403, body=b'{"detail":"User is locked. Reason: TOP_UP"}')
    sandbox.fault = lambda request: locked if request.path == path else None
    with pytest.raises(AccountLockedError, match="TOP_UP"):
        in_pieces(settings, days)
    recorded = ask(settings, "select account, error from ops.failures", opened)
    assert recorded == [("acme", "AccountLockedError")]
