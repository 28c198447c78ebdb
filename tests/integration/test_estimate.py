"""`faletl estimate`: fal's figure beside what was charged, both exact, from a real server and file."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import ContractError, KeyRefusedError, UsageError
from faletl.operations.estimate import PATH, Estimates, PastCost, PlannedUse, estimate, planned
from faletl.sandbox import FULL_KEY, Calls, Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import settings_for
from tests.integration.test_cli import faletl

CANARY = "canary-id:canary-secret-0123456789"


def plans(*texts: str, by_calls: bool = False) -> list[PlannedUse]:
    return [planned(text, by_calls=by_calls) for text in texts]


def estimates(settings: Settings, *texts: str, by_calls: bool = False) -> Estimates:
    return estimate(settings, plans(*texts, by_calls=by_calls), by_calls=by_calls)


def load(settings: Settings, *days: date, resources: tuple[str, ...] = ()) -> None:
    for day in days:
        report = pipeline.run(settings, Asked(day, day + timedelta(1), resources))
        assert report.exit_code == 0


def answering(text: str) -> Any:
    """Fal answers every estimate with that total, written so."""

    def hook(request: Request) -> Fault | None:
        kind = "unit_price" if b"unit_price" in request.body else "historical_api_price"
        body = f'{{"estimate_type": "{kind}", "total_cost": {text}, "currency": "USD"}}'
        return Fault(body=body.encode()) if request.path == PATH else None

    return hook


# --- What is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoint_id", "quantity"),
    [
        ("fal-ai/flux/dev=100", "fal-ai/flux/dev", "100"),
        ("fal-ai/flux/dev=0.000001", "fal-ai/flux/dev", "0.000001"),
        ("acme/a=b=2.5", "acme/a=b", "2.5"),
        ("acme/a==7", "acme/a=", "7"),
        ("acme/a=007.50", "acme/a", "7.5"),
        ("acme/a=1e3", "acme/a", "1000"),
        ("acme/a=123456789012345.123456789012", "acme/a", "123456789012345.123456789012"),
    ],
)  # fmt: skip
def test_a_quantity_is_sent_digit_by_digit(text: str, endpoint_id: str, quantity: str) -> None:
    with Sandbox(truth.two_days(), fault=answering("1")) as server:
        estimates(settings_for(server.url, Path()), text)
        (request,) = server.requests
    sent = json.loads(request.body, parse_float=str, parse_int=str)
    assert sent == {
        "estimate_type": "unit_price",
        "endpoints": {endpoint_id: {"unit_quantity": quantity}},
    }


@pytest.mark.parametrize(
    "text",
    ["", "=", "=5", " =5", "a", "a=", "a=x", "a=-1", "a=+1", "a=0", "a=0.0000009", "a=1,000", "a=nan",
     "a=1e999", "a=0.1234567890123", "a=½", "a=١", "a=0x10", "a=1=", "a=123456789012345678901234567"],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text: str) -> None:
    for by_calls in (False, True):
        with pytest.raises(UsageError):
            planned(text, by_calls=by_calls)


def test_calls_are_whole(tmp_path: Path) -> None:
    for text in ("a=1.5", "a=0.1"):
        with pytest.raises(UsageError, match="whole number"):
            planned(text, by_calls=True)
    assert planned("a=3.0", by_calls=True) == PlannedUse("a", Decimal(3))
    with Sandbox(truth.two_days(), fault=answering("1")) as server:
        estimates(settings_for(server.url, tmp_path), "a=3.0", "b=1", by_calls=True)
        bodies = [json.loads(request.body, parse_int=str) for request in server.requests]
    assert bodies == [
        {"estimate_type": "historical_api_price", "endpoints": {name: {"call_quantity": many}}}
        for name, many in (("a", "3"), ("b", "1"))
    ]


# --- What fal answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "total"),
    [("0.1", "0.1"), ("0", "0"), ("1e-6", "0.000001"), ("0.30000000000000004", "0.3"),
     ("0.1234567890125", "0.123456789012"), ("123456789012345.123456789012",) * 2],
)  # fmt: skip
def test_a_figure_is_read_by_its_text(written: str, total: str) -> None:
    with Sandbox(truth.two_days(), fault=answering(written)) as server:
        (one,) = estimates(settings_for(server.url, Path()), "a=1").found
    assert (one.total_cost, one.currency) == (Decimal(total), "USD")


@pytest.mark.parametrize("written", ["-1", "1e999", "null", '"1"', "true", "1000000000000000", "[]"])
def test_a_figure_that_is_no_amount_breaks_the_contract(written: str) -> None:
    with (
        Sandbox(truth.two_days(), fault=answering(written)) as server,
        pytest.raises(ContractError, match="estimate"),
    ):
        estimates(settings_for(server.url, Path()), "a=1")


def test_an_estimate_of_another_kind_breaks_the_contract() -> None:
    body = b'{"estimate_type": "historical_api_price", "total_cost": 1, "currency": "USD"}'
    with (
        Sandbox(truth.two_days(), fault=lambda _: Fault(body=body)) as server,
        pytest.raises(ContractError, match="not of the requested type"),
    ):
        estimates(settings_for(server.url, Path()), "a=1")


def test_a_key_that_is_refused_is_told() -> None:
    with Sandbox(truth.two_days()) as server, pytest.raises(KeyRefusedError, match="FAL_KEY"):
        estimates(settings_for(server.url, Path(), key="un:known-key"), f"{truth.FLUX}=1")


# --- What was charged -----------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_each_unit_billed_has_a_line_of_its_own(tmp_path: Path) -> None:
    account = truth.two_days()
    account.lines.append(truth.line(account.lines[0].hour, truth.FLUX, "7", "0.03", currency="EUR"))
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path)
        load(settings, truth.day(21), truth.day(22), resources=("usage",))
        found = estimates(settings, f"{truth.FLUX}=2.5", f"{truth.VOICE}=3", f"{truth.VIDEO}=1").found[
            :2
        ]
    flux, voice = found
    per_unit = {}
    for unit, currency in (("images", "USD"), ("megapixels", "USD"), ("images", "EUR")):
        mine = [
            one for one in account.lines
            if (one.endpoint_id, one.unit, one.currency) == (truth.FLUX, unit, currency)
        ]  # fmt: skip
        cost = sum((one.cost_total for one in mine), Decimal(0))
        per_unit[unit, currency] = truth.quotient(cost, sum((one.quantity for one in mine), Decimal(0)))
    assert {(one.unit, one.currency): one.cost_per_unit for one in flux.charged} == per_unit
    assert all(one.cost == one.cost_per_unit * Decimal("2.5") for one in flux.charged)
    assert flux.total_cost == Decimal("0.0625")
    assert voice.charged == [PastCost("1000 characters ", Decimal("0.02"), Decimal("0.06"), "USD")]


@pytest.mark.usefixtures("clock")
def test_calls_are_counted_on_the_days_that_tell_them(tmp_path: Path) -> None:
    """Requests that failed are calls, too; a day without analytics is no day without calls."""
    account = truth.two_days()
    hour = account.lines[0].hour
    account.failing = [Calls(hour, truth.FLUX, user_error_count=4)]
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path)
        load(settings, truth.day(21))
        load(settings, truth.day(22), resources=("usage",))
        found = estimates(settings, f"{truth.FLUX}=1000", f"{truth.VIDEO}=1", by_calls=True)
    mine = [one for one in account.lines if one.endpoint_id == truth.FLUX and one.hour.day == 21]
    cost = sum((one.cost_total for one in mine), Decimal(0))
    per_call = truth.quotient(cost, Decimal(len(mine) + 4))
    assert per_call is not None
    assert found.found[0].charged == [PastCost(None, per_call, per_call * 1000, "USD")]
    assert found.history is not None
    assert found.history.last_day == truth.day(22)


@pytest.mark.usefixtures("clock")
def test_history_is_thirty_days_up_to_the_newest_day_of_spend(tmp_path: Path) -> None:
    account = truth.Account()
    for day, price in ((date(2026, 10, 21), "9"), (date(2026, 10, 22), "2"), (date(2026, 11, 20), "4")):
        at = datetime(day.year, day.month, day.day, 5, tzinfo=UTC)
        account.lines.append(truth.line(at, unit_price=price))
    account.list_price(truth.FLUX, "1")
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path)
        load(settings, *(one.hour.date() for one in account.lines), resources=("usage",))
        found = estimates(settings, f"{truth.FLUX}=1")
    assert found.found[0].charged == [PastCost("images", Decimal(3), Decimal(3), "USD")]
    assert found.history is not None
    assert (found.history.first_day, found.history.last_day) == (date(2026, 10, 22), date(2026, 11, 20))


@pytest.mark.usefixtures("clock")
def test_of_several_accounts_that_of_the_key_counts(tmp_path: Path) -> None:
    for name, price, key in (("acme", "1", FULL_KEY), ("other", "2", truth.OTHER_KEY)):
        account = truth.Account(
            name, [truth.line(datetime(2026, 11, 22, 5, tzinfo=UTC), unit_price=price)]
        )
        account.list_price(truth.FLUX, price)
        with Sandbox(account, keys={key: "FULL"}) as server:
            settings = settings_for(server.url, tmp_path, key=key)
            load(settings, truth.day(22), resources=("usage",))
            found = estimates(settings, f"{truth.FLUX}=1")
            assert [one.cost for one in found.found[0].charged] == [Decimal(price)]
            assert found.history is not None
            assert found.history.account == name
            wrong = settings_for(server.url, tmp_path, key=key, account="nobody")
            with pytest.raises(UsageError, match="FALETL_ACCOUNT is 'nobody'"):
                estimates(wrong, f"{truth.FLUX}=1")


# --- From a terminal ------------------------------------------------------------------------------


def test_before_the_first_run_there_is_fals_figure_alone(settings: Settings, tmp_path: Path) -> None:
    done = faletl("estimate", f"{truth.FLUX}=100", settings=settings, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^fal-ai/flux/dev +100 +2.5 +USD +no history *$", done.stdout, re.MULTILINE)
    assert "No charges of this account are published yet" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_figures_stand_side_by_side(tmp_path: Path) -> None:
    account = truth.two_days()
    account.catalogue.append({"endpoint_id": "acme/idle"})
    with Sandbox(account) as server, time_machine.travel(truth.NOW, tick=False):
        settings = settings_for(server.url, tmp_path)
        load(settings, truth.day(21), truth.day(22))
        units = faletl("estimate", f"{truth.FLUX}=100", "acme/idle=1", settings=settings)
        calls = faletl("estimate", f"{truth.FLUX}=100", "acme/idle=1", "--calls", settings=settings)
    assert (units.returncode, calls.returncode) == (0, 0), units.stderr + calls.stderr
    assert re.search(r"^fal-ai/flux/dev +images +100 +2.5 +USD +0.0235 +2.35 +USD$", units.stdout, re.M)
    assert re.search(r"^fal-ai/flux/dev +megapixels +0.03 +3 +USD$", units.stdout, re.M)
    assert re.search(r"^acme/idle +1 +no price +no history *$", units.stdout, re.M)
    assert "Charged: account acme, 2026-10-24 to 2026-11-22." in units.stdout
    assert re.search(r"^fal-ai/flux/dev +100 +5.4166666667 +USD +0.054166666667 +5.4166666667 +USD$",
                     calls.stdout, re.M), calls.stdout  # fmt: skip
    assert re.search(r"^acme/idle +1 +no history +no history *$", calls.stdout, re.M)


def test_an_unknown_endpoint_is_named_and_the_others_are_answered(settings: Settings) -> None:
    done = faletl("estimate", "no/such=1", f"{truth.FLUX}=1", settings=settings)
    assert done.returncode == 2
    assert done.stderr == "faletl: fal knows no endpoint 'no/such'; look it up on fal.ai/models\n"
    assert "0.025" in done.stdout


@pytest.mark.parametrize("args", [["a"], ["a=x"], ["a=1", "b="], ["a=1.5", "--calls"], []])
def test_a_wrong_plan_is_told_before_anything_is_asked(args: list[str], tmp_path: Path) -> None:
    with Sandbox(truth.two_days()) as server:
        done = faletl("estimate", *args, settings=settings_for(server.url, tmp_path))
        assert server.requests == []
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("status", "code"), [(401, 2), (403, 2), (422, 3)])
def test_an_estimate_never_shows_a_key_that_was_echoed(status: int, code: int, tmp_path: Path) -> None:
    def echo(request: Request) -> Fault:
        said = {"error": {"message": f"bad header {request.headers['authorization']}"}}
        return Fault(status=status, body=json.dumps(said).encode())

    with Sandbox(truth.two_days(), keys={CANARY: "FULL"}, fault=echo) as server:
        settings = settings_for(server.url, tmp_path)
        done = faletl("--debug", "estimate", "a=1", settings=settings, FAL_KEY=CANARY)
    assert done.returncode == code
    assert "[key]" in done.stderr
    assert CANARY.split(":")[1] not in done.stdout + done.stderr
