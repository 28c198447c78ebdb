"""Rows that break their contract are set aside, and what fal changes of its contract is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine
import zstandard

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import UnprovenError
from faletl.operations import quarantine
from faletl.operations.rebuild import rebuild
from faletl.resources import RESOURCES, Column
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import ask, opened, settings_for, total
from tests.forked import called
from tests.integration.test_run import (
    PLAIN,
    one_row,
    run_broken,
    served_as,
    summary,
    usage_page,
)


def held(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the warehouse itself, whether published or not."""
    return ask(settings, sql, opened)


def with_number(field: str, text: str) -> bytes:
    """A page with a good row and one whose field holds that text where a number belongs."""
    page = usage_page(PLAIN, {**PLAIN, "endpoint_id": truth.VIDEO, field: 4242424242})
    return page.replace(b"4242424242", text.encode())


WHOLE = {**PLAIN, "auth_method": "backend", "auth_method_structured": {"detail": "backend"}}

BROKEN = [
    ("quantity", "null", "quantity is null"),
    ("quantity", '"1"', "quantity is text where a number belongs"),
    ("quantity", "{}", "quantity is an object where a number belongs"),
    ("cost_total", "1e999", "cost_total is out of range"),
    ("cost_total", "9" * 400, "cost_total is out of range"),
    ("cost_total", "NaN", "cost_total is text where a number belongs"),
    ("unit_price", "-Infinity", "unit_price is text where a number belongs"),
    ("cost_total", "-0.5", "cost_total is negative: -0.5"),
    (
        "unit_price",
        "1e-13",
        "unit_price must be a number below 10^15 that does not round to zero: 1e-13",
    ),
    (
        "quantity",
        "1e15",
        "quantity must be a number below 10^15 that does not round to zero: 1000000000",
    ),
    ("quantity", "99999999999999999999", "quantity must be a number below 10^15 that does not round to"),
    ("percent_discount", "101", "percent_discount is more than 100: 101"),
    ("endpoint_id", '""', "endpoint_id is empty"),
]


@pytest.mark.parametrize(("field", "text", "reason"), BROKEN)
def test_a_row_of_no_value_is_set_aside_and_the_rest_is_loaded(
    field: str, text: str, reason: str, clock: time_machine.Traveller, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fault = served_as(with_number(field, text), summary("0.025"))
    report, settings, _ = run_broken(one_row(), tmp_path, fault)
    assert report.exit_code == 0
    assert total(settings) == Decimal("0.025")
    of = "" if field == "endpoint_id" else f" ({truth.VIDEO})"
    assert f"1 row violates fal's contract (page 1 row 2{of}: " in caplog.text
    assert "they are quarantined and the others are loaded" in caplog.text
    [(page, row, why, raw, landing_path, resolved_at)] = ask(
        settings, "select page, row, reason, raw_json, landing_path, resolved_at from ops.quarantine"
    )
    assert (page, row, resolved_at) == (1, 2, None)
    assert why.startswith(reason)
    assert json.loads(raw)["unit"] == "images"
    told = ask(settings, "select endpoint_id from ops.quarantine")
    assert told == [("" if field == "endpoint_id" else truth.VIDEO,)]
    assert list((tmp_path / "landing" / landing_path).glob("rows-*"))
    assert ask(
        settings,
        "select quarantined_rows, rows, control_total from ops.loads where window_start = "
        "'2026-11-22 00:00:00Z'",
    ) == [(1, 1, Decimal("0.025"))]


@pytest.mark.parametrize(("field", "text", "reason"), BROKEN)
def test_a_row_that_may_be_of_value_refuses_its_window_and_no_other(
    field: str, text: str, reason: str, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    fault = served_as(with_number(field, text), summary("1.5"))
    report, settings, _ = run_broken(one_row(), tmp_path, fault)
    assert report.exit_code == 3
    [(_, error)] = report.failures
    assert reason in str(error)
    assert "have a value" in str(error)
    assert str(error).startswith("usage, window 2026-11-22, page 1: 1 row violates fal's contract")
    assert total(settings) == 0
    assert ask(settings, "select window_start::date::varchar from ops.loads order by 1") == [
        ("2026-11-21",), ("2026-11-23",)
    ]  # fmt: skip
    assert ask(settings, "select page, row, resolved_at from ops.quarantine") == [(1, 2, None)]


def test_an_odd_price_is_quarantined_alone_until_a_newer_list_has_it(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = truth.two_days()
    prices = [
        {"endpoint_id": truth.FLUX, "unit": "images", "unit_price": "free", "currency": "USD"},
        {"endpoint_id": truth.VIDEO, "unit": "seconds", "unit_price": 0.7, "currency": "USD"},
    ]
    body = json.dumps({"prices": prices, "next_cursor": None, "has_more": False}).encode()
    is_odd = [True]

    def fault(request: Request) -> Fault | None:
        return Fault(body=body) if is_odd[0] and request.path.endswith("/pricing") else None

    quarantined = (
        "select resource, reason, endpoint_id, resolved_at is null from ops.quarantine order by 4"
    )
    why = ("prices", "unit_price is text where a number belongs", truth.FLUX)
    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        assert pipeline.run(settings).exit_code == 0
        assert held(settings, quarantined) == [(*why, True)]
        assert held(settings, "select endpoint_id, unit_price from raw.prices") == [
            (truth.VIDEO, Decimal("0.7"))
        ]
        assert total(settings) > 0
        clock.shift(86_400)
        assert pipeline.run(settings).exit_code == 0  # still odd: only the newest is open
        assert held(settings, quarantined) == [(*why, False), (*why, True)]
        is_odd[0] = False
        clock.shift(86_400)
        assert pipeline.run(settings).exit_code == 0
    assert held(settings, quarantined) == [(*why, False), (*why, False)]
    assert quarantine.quarantined_rows(settings) == []


def test_a_good_read_resolves_what_was_set_aside(clock: time_machine.Traveller, tmp_path: Path) -> None:
    answers = served_as(with_number("quantity", "null"), summary("1.5"))
    is_broken = [True]

    def fault(request: Request) -> Fault | None:
        return answers(request) if is_broken[0] else None

    with Sandbox(one_row(), fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        days = Asked(truth.day(22), truth.day(23), ["usage"])
        assert pipeline.run(settings, days).exit_code == 3
        assert pipeline.run(settings, days).exit_code == 3
        assert held(settings, "select count(*) from ops.quarantine") == [(1,)]
        is_broken[0] = False
        assert pipeline.run(settings, days).exit_code == 0
    assert held(settings, "select count(*), count(resolved_at) from ops.quarantine") == [(1, 1)]
    assert quarantine.quarantined_rows(settings) == []
    assert len(quarantine.quarantined_rows(settings, is_open=False)) == 1


def test_a_cost_that_is_not_told_yet_is_set_aside_and_loaded_once_it_is(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = one_row()
    account.lines.append(replace(account.lines[0], endpoint_id=truth.VIDEO))
    told = WHOLE | {"auth_method_structured": {"detail": "backend", "api_key_id": "key-1"}}
    costs = ("cost_subtotal", "cost_discount", "cost_total", "cost")
    pending = {**told, "endpoint_id": truth.VIDEO} | dict.fromkeys(costs)
    answers = served_as(usage_page(told, pending), summary("0.025"))
    is_pending = [True]
    with Sandbox(account, fault=lambda one: answers(one) if is_pending[0] else None) as server:
        settings = settings_for(server.url, tmp_path)
        assert pipeline.run(settings, Asked(resources=["usage"])).exit_code == 0
        assert total(settings) == Decimal("0.025")
        [(reason, endpoint)] = ask(settings, "select reason, endpoint_id from ops.quarantine")
        assert (reason, endpoint) == ("cost_total is missing", truth.VIDEO)
        assert ask(settings, "select sum(quarantined_rows) from ops.loads") == [(1,)]
        is_pending[0] = False
        clock.shift(86_400)
        assert pipeline.run(settings, Asked(resources=["usage"])).exit_code == 0
    assert total(settings) == Decimal("0.05")
    assert ask(settings, "select count(*) from ops.quarantine where resolved_at is null") == [(0,)]
    changes = "select endpoint_id, cost_total_before, cost_total_after from ops.restatements"
    assert ask(settings, changes) == [(truth.VIDEO, 0, Decimal("0.025"))]


def learn_to_take_any_discount(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an upgrade of faletl might bring."""

    def taught(columns: tuple[Column, ...]) -> tuple[Column, ...]:
        return tuple(
            replace(column, at_most=None) if column.name == "percent_discount" else column
            for column in columns
        )

    usage = RESOURCES["usage"]
    assert usage.proof is not None
    proof = replace(usage.proof, columns=taught(usage.proof.columns))
    fixed = replace(usage, columns=taught(usage.columns), proof=proof)
    for module in ("faletl.staging.window", "faletl.line.load"):
        monkeypatch.setattr(sys.modules[module], "RESOURCES", {**RESOURCES, "usage": fixed})


@pytest.mark.parametrize(("amount", "was_refused"), [(0.025, True), (0, False)])
def test_a_retry_after_a_fix_loads_the_rows_from_their_landed_pages(
    amount: float, was_refused: bool, clock: time_machine.Traveller, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    charged = {"quantity": amount / 0.025, "cost_subtotal": amount, "cost_total": amount, "cost": amount}
    odd = {**PLAIN, "endpoint_id": truth.VIDEO, "percent_discount": 101, **charged}
    control = {"summary": [PLAIN, odd] if was_refused else [PLAIN], "has_more": False}
    fault = served_as(usage_page(PLAIN, odd), Fault(body=json.dumps(control).encode()))
    report, settings, server = run_broken(one_row(), tmp_path, fault)
    assert report.exit_code == (3 if was_refused else 0)
    asked = len(server.requests)
    reasons = [row["reason"] for row in quarantine.quarantined_rows(settings)]

    assert quarantine.retry(settings).exit_code == 3  # nothing was fixed
    assert [row["reason"] for row in quarantine.quarantined_rows(settings)] == reasons != []

    learn_to_take_any_discount(monkeypatch)
    done = quarantine.retry(settings)
    assert done.exit_code == 0
    assert quarantine.quarantined_rows(settings) == []
    assert total(settings) == Decimal("0.05" if was_refused else "0.025")
    assert ask(settings, "select count(*) from raw.usage") == [(2,)]
    assert len(server.requests) == asked


def test_a_row_stays_open_and_can_be_retried_as_long_as_reads_find_it(
    clock: time_machine.Traveller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"quantity": 0, "cost_subtotal": 0, "cost_total": 0, "cost": 0}
    odd = {**WHOLE, "endpoint_id": truth.VIDEO, "percent_discount": 101, **free}
    fault = served_as(usage_page(WHOLE, odd), summary("0.025"))
    settings = None
    with Sandbox(one_row(), fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        for _ in range(3):
            report = pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"]))
            assert report.exit_code == 0
            clock.shift(3600)
    assert held(settings, "select count(*), count(resolved_at) from ops.quarantine") == [(1, 0)]
    assert held(settings, "select sum(quarantined_rows) from ops.loads") == [(1,)]
    learn_to_take_any_discount(monkeypatch)
    assert quarantine.retry(settings).exit_code == 0
    assert held(settings, "select count(*), count(resolved_at) from ops.quarantine") == [(0, 0)]
    assert ask(settings, "select count(*) from raw.usage") == [(2,)]


def test_a_retry_that_fails_leaves_what_is_loaded(
    clock: time_machine.Traveller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {**WHOLE, "endpoint_id": truth.VIDEO, "percent_discount": 101}
    fault = served_as(usage_page(WHOLE, odd), summary("0.025"))  # the row is no part of the total
    _, settings, _ = run_broken(one_row(), tmp_path, fault)
    learn_to_take_any_discount(monkeypatch)
    report = quarantine.retry(settings)
    assert report.exit_code == 3
    assert "do not add up" in str(report.failures[0][1])
    assert held(settings, "select count(*), sum(cost_total) from raw.usage") == [(1, Decimal("0.025"))]
    assert len(quarantine.quarantined_rows(settings)) == 1
    with pytest.raises(UnprovenError):
        rebuild(settings, truth.day(22))
    assert held(settings, "select count(*), sum(cost_total) from raw.usage") == [(1, Decimal("0.025"))]


def test_the_commands_show_what_is_set_aside(clock: time_machine.Traveller, tmp_path: Path) -> None:
    fault = served_as(with_number("quantity", '"\\u001b[31m<script>"'), summary("1.5"))
    _, settings, _ = run_broken(one_row(), tmp_path, fault)
    [row] = quarantine.quarantined_rows(settings)

    def faletl(*arguments: str) -> subprocess.CompletedProcess[str]:
        given = {"FALETL_WAREHOUSE": settings.warehouse, "FALETL_LANDING": settings.landing}
        return called(arguments, given, tmp_path)

    listed = faletl("quarantine", "list")
    assert listed.returncode == 0
    assert row["load_id"] in listed.stdout
    assert "quantity is text where a number belongs" in " ".join(listed.stdout.split())
    shown = faletl("quarantine", "show", row["load_id"])
    assert '"\\u001b[31m<script>"' in shown.stdout
    assert "\x1b" not in shown.stdout
    assert row["landing_path"] in shown.stdout
    retried = faletl("quarantine", "retry")
    assert retried.returncode == 3
    assert "quantity is text" in retried.stderr
    assert faletl("quarantine", "show", "nothing").returncode == 2
    assert faletl("quarantine", "retry", "nothing").returncode == 2
    assert '"quarantine": 1' in faletl("status", "--json").stdout


# --- Drift of the contract ------------------------------------------------------------------------

DRIFTS = "select field, kind, sample from ops.contract_drift order by all"


def test_a_new_field_is_kept_in_the_page_recorded_and_reported_once(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = usage_page({**WHOLE, "region": "eu-west"})
    fault = served_as(page, summary("0.025"))
    report, settings, _ = run_broken(one_row(), tmp_path, fault)
    assert report.exit_code == 0
    assert total(settings) == Decimal("0.025")
    assert "fal sends an unknown field, region" in caplog.text
    assert ask(settings, DRIFTS) == [("region", "new", '"eu-west"')]
    [path] = ask(settings, "select landing_path from ops.contract_drift")[0]
    [landed] = (tmp_path / "landing" / path).glob("rows-*")
    assert b"eu-west" in zstandard.ZstdDecompressor().decompress(landed.read_bytes())

    caplog.clear()
    run_broken(one_row(), tmp_path, fault)
    assert ask(settings, DRIFTS) == [("region", "new", '"eu-west"')]
    assert "region" not in caplog.text


def test_fields_around_the_records_are_noticed(clock: time_machine.Traveller, tmp_path: Path) -> None:
    page = json.loads(usage_page({**WHOLE, 'odd"\\name': 1, "a.b": 2}))
    page["time_series"][0]["note"] = "of a bucket"
    page["notice"] = ["of a page"]
    fault = served_as(json.dumps(page).encode(), summary("0.025"))
    report, settings, _ = run_broken(one_row(), tmp_path, fault)
    assert report.exit_code == 0
    assert ask(settings, DRIFTS) == [
        ("$.notice", "new", '["of a page"]'),
        ("$.time_series.note", "new", '"of a bucket"'),
        ("a.b", "new", "2"),
        ('odd"\\name', "new", "1"),
    ]


def test_an_optional_field_that_is_gone_is_survived_and_noticed(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {**WHOLE}
    del row["cost_discount"]
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(usage_page(row), summary("0.025")))
    assert report.exit_code == 0
    assert ask(settings, DRIFTS) == [("cost_discount", "missing", None)]
    assert "fal no longer sends cost_discount" in caplog.text
    assert total(settings) == Decimal("0.025")


def test_an_object_that_is_gone_with_all_its_fields_is_noticed(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    row = {**WHOLE}
    del row["auth_method_structured"]
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(usage_page(row), summary("0.025")))
    assert report.exit_code == 0
    assert ask(settings, DRIFTS) == [("auth_method_structured", "missing", None)]


def test_what_is_noticed_of_a_window_that_does_not_add_up_is_kept(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    page = usage_page({**WHOLE, "region": "eu-west"})
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(page, summary("9")))
    assert report.exit_code == 3
    assert held(settings, DRIFTS) == [("region", "new", '"eu-west"')]


def test_a_required_field_that_is_gone_refuses_the_window_and_is_named(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    row = {**WHOLE}
    del row["quantity"]
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(usage_page(row), summary("0.025")))
    assert report.exit_code == 3
    assert "quantity is missing" in str(report.failures[0][1])
    assert held(settings, DRIFTS) == [("quantity", "missing", None)]
    assert held(settings, "select reason from ops.quarantine") == [("quantity is missing",)]


def test_a_field_of_another_type_is_noticed(clock: time_machine.Traveller, tmp_path: Path) -> None:
    row = {**WHOLE, "unit_price": "0.025"}
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(usage_page(row), summary("0.025")))
    assert report.exit_code == 3
    assert held(settings, DRIFTS) == [("unit_price", "retyped", '"0.025"')]


def test_an_ordinary_run_notices_nothing(
    clock: time_machine.Traveller, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    assert pipeline.run(settings).exit_code == 0
    assert ask(settings, "select count(*) from ops.contract_drift") == [(0,)]
    assert ask(settings, "select count(*) from ops.quarantine") == [(0,)]
