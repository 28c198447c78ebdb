"""The fast way of a page through staging keeps every number as it was written, or is not taken."""

from __future__ import annotations

import json
import re
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from faletl.errors import ContractError, DataRefusedError
from faletl.money import EXACT_TEXT, exact_text
from faletl.resources import RESOURCES
from tests.unit.test_catalogue import stage, staged_rows

EVENTS = RESOURCES["billing_events"]

digits = st.text("0123456789", min_size=1, max_size=22).map(lambda text: text.lstrip("0") or "0")
fractions = st.just("") | st.text("0123456789", min_size=1, max_size=22).map(".{}".format)
exponents = st.just("") | st.builds("{}{}".format, st.sampled_from("eE"), st.integers(-30, 30))
tokens = st.builds("{}{}{}".format, digits, fractions, exponents)


def body(token: str) -> bytes:
    """A page with one charge of that quantity."""
    return (
        b'{"billing_events": [\n {"request_id": "4e2e-9000-1e-300", "endpoint_id": "a/b\\u2028c", '
        b'"timestamp": "2026-11-22T09:14:22Z", "quantity": %s, "cost_total": 0.09,\r\n'
        b' "unknown": {"deep": [1e5, "1234567890123456789"]}}], "next_cursor": null, "has_more": false}'
    ) % token.encode()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(token=tokens)
@example("0.1")
@example("1e-7")
@example("0.000001500")
@example("1.00000000000001e-5")
@example("1.5e-12")
@example("1e-400")
@example("123456789.123456")
@example("999999999999999")
@example("9999999999999999")
@example("1234.123456789012")
@example("0.1234567890123")
@example("0.30000000000000004")
@example("12345678.123456789012")
@example("1e22")
@example("100000e-5")
def test_a_number_is_kept_as_it_was_written_or_refused(token: str) -> None:
    kept, is_rounded = exact_text(token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = staged_rows(staged := stage(EVENTS, body(token), Path(folder)))[0]
        except DataRefusedError:
            assert not re.fullmatch(EXACT_TEXT, kept)
            return
    assert row["quantity"] == Decimal(kept)
    assert staged.rounded_amounts == is_rounded
    assert is_rounded or row["quantity"] == Decimal(token)
    assert row["endpoint_id"] == "a/b\u2028c"


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        (b'"quantity": 2,', b'"quantity": 2, "quantity": 3,'),
        (b'"quantity": 2,', b'"quantity" : 2, "quantity":3,'),
        (b'"quantity": 2,', b'"quantity": 2, "quantit\\u0079": 3,'),
        (b'"quantity": 2,', b'"quantity": 2, "quantity": 3, "unknown too": "\\u0022\\u0022",'),
        (b'{"billing_events"', b'{"billing_events" :\n [], "billing_events"'),
        (b'{"billing_events"', b'{"billing_event\\u0073": [], "billing_events"'),
    ],
)
def test_a_key_that_comes_twice_is_refused(once: bytes, twice: bytes, tmp_path: Path) -> None:
    page = body("2").replace(once, twice)
    assert page != body("2")
    with pytest.raises((ContractError, DataRefusedError)):
        stage(EVENTS, page, tmp_path)


def test_exact_twins_are_numbered_and_others_are_not(tmp_path: Path) -> None:
    record = json.loads(body("2"))["billing_events"][0]
    records = [record, record, {**record, "quantity": 3}, {**record, "auth_method": "x"}, record]
    for order in (1, -1):
        page = {"billing_events": records[::order], "next_cursor": None, "has_more": False}
        rows = staged_rows(stage(EVENTS, json.dumps(page).encode(), tmp_path / str(order)))
        numbered = sorted((row["quantity"], row["auth_method"] or "", row["_ordinal"]) for row in rows)
        two, three = Decimal(2), Decimal(3)
        assert [(q, n) for q, _, n in numbered if q == three] == [(three, 1)]
        assert sorted(n for q, _, n in numbered if q == two) == [1, 2, 3, 4]
        # Twins by their identity may differ elsewhere: their numbers do not depend on the order.
        assert [n for q, label, n in numbered if label == "x"] == [1]
        assert len({(row["_hash"], row["_ordinal"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("column", ["quantity", "cost_total"])
@pytest.mark.parametrize(
    ("one", "other"),
    [("0.000000000001", "0.000000000002"), ("999999.5", "1000000"), ("1000000", "1000001"),
     ("12345678901234", "12345678901235")],
)  # fmt: skip
def test_an_amount_of_any_size_tells_rows_apart(
    column: str, one: str, other: str, tmp_path: Path
) -> None:
    staged = []
    for token in (one, other):
        sent = page(charge(**{column: "amount"})).replace(b'"amount"', token.encode())
        staged.append(stage(EVENTS, sent, tmp_path / token))
    assert len({each.digest for each in staged}) == 2
    hashes = {row["_hash"] for each in staged for row in staged_rows(each)}
    assert len(hashes) == (2 if column in EVENTS.identity else 1)


# --- Instants, and the edges of a day -------------------------------------------------------------

DAY = "2026-11-22"


def charge(**changed: Any) -> dict[str, Any]:
    """A charge like that of `body`, with some fields changed."""
    whole: dict[str, Any] = json.loads(body("2"))["billing_events"][0]
    return whole | changed


def page(*records: dict[str, Any]) -> bytes:
    """A page with these charges."""
    return json.dumps({"billing_events": records, "next_cursor": None, "has_more": False}).encode()


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-11-22T00:00:00Z", "00:00:00"),
        ("2026-11-22T05:44:59+05:45", None),
        ("2026-11-22T05:45:00+05:45", "00:00:00"),
        ("2026-11-21T14:30:00-09:30", "00:00:00"),
        ("2026-11-23T13:59:59+14:00", "23:59:59"),
        ("2026-11-22T23:59:59.999999Z", "23:59:59.999999"),
        ("2026-11-22T23:59:59.999999999Z", "23:59:59.999999"),
        ("2026-11-22T24:00:00Z", None),
        ("2026-11-23T00:00:00Z", None),
        ("2026-11-21T23:59:59.999999Z", None),
        ("2026-11-21T24:00:00Z", "00:00:00"),
        ("2028-02-29T12:00:00Z", None),
        ("1970-01-01T00:00:00Z", None),
        ("9999-12-31T23:59:59Z", None),
    ],
)
def test_an_instant_is_kept_in_utc_to_the_microsecond_and_in_its_own_day_alone(
    text: str, utc: str | None, tmp_path: Path
) -> None:
    staged = stage(EVENTS, page(charge(timestamp=text)), tmp_path)
    kept = [row["timestamp"].replace(tzinfo=None).isoformat() for row in staged_rows(staged)]
    assert kept == ([f"{DAY}T{utc}"] if utc else [])
    assert staged.dropped_rows == (utc is None)


@pytest.mark.parametrize(
    "text",
    ["2026-11-22T12:00:00", "2026-11-22", "2026-11-22T12:00:60Z", "2026-11-22T12:60:00Z",
     "2026-11-22T25:00:00Z", "2026-02-29T12:00:00Z", "2026-13-01T12:00:00Z", "2026-11-22T12:00:00+15:00",
     "2026-11-22T12:00:00+99:99", "2026-11-22T12:00:00 America/New_York", "2026-11-22T12:00:00Z ",
     "20261122T120000Z", "1795348800", "yesterday", ""],
)  # fmt: skip
def test_an_instant_that_names_no_moment_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataRefusedError, match="timestamp is no instant with an offset"):
        stage(EVENTS, page(charge(timestamp=text)), tmp_path)


def test_buckets_that_are_named_in_another_zone_are_taken_for_what_they_are(tmp_path: Path) -> None:
    row = {"endpoint_id": "a", "unit": "u", "quantity": 1, "unit_price": 1, "cost_total": 1}
    names = ["2026-11-21T19:00:00-05:00", "2026-11-22T05:45:00+05:45", "2026-11-22T23:00:00+00:00"]
    series = [{"bucket": name, "results": [row]} for name in names]
    document = {"time_series": series, "next_cursor": None, "has_more": False}
    staged = stage(RESOURCES["usage"], json.dumps(document).encode(), tmp_path)
    assert [row["bucket"].hour for row in staged_rows(staged)] == [0, 0, 23]


# --- Sizes ----------------------------------------------------------------------------------------


def test_more_rows_than_were_asked_for_are_taken_and_add_up_exactly(tmp_path: Path) -> None:
    amounts = [("0.1", 20_000), ("0.000015", 20), ("1e-7", 10_000), ("0.123456789012", 3)]
    rest = '"endpoint_id": "a", "timestamp": "2026-11-22T09:00:00Z", "cost_total": '
    records = ",".join(
        f'{{"request_id": "{number}", {rest}{amount}}}'
        for amount, count in amounts
        for number in range(count)
    )
    document = f'{{"billing_events": [{records}], "next_cursor": null, "has_more": false}}'
    staged = stage(EVENTS, document.encode(), tmp_path)
    assert staged.rows == sum(count for _, count in amounts) > 10_000
    assert Decimal(staged.cost_total) == sum(Decimal(amount) * count for amount, count in amounts)
    assert staged.rounded_amounts == 0


@pytest.mark.parametrize("name", ["endpoint_id", "request_id", "unit", "auth_method"])
def test_a_text_that_is_too_long_to_be_meant_is_refused_and_not_repeated(
    name: str, tmp_path: Path
) -> None:
    staged = stage(EVENTS, page(charge(**{name: "é" * 500})), tmp_path / "long")
    assert staged_rows(staged)[0][name] == "é" * 500
    with pytest.raises(DataRefusedError, match=f"{name} is longer than 1,000 bytes") as caught:
        stage(EVENTS, page(charge(**{name: "é" * 501})), tmp_path / "longer")
    assert len(str(caught.value)) < 500


def test_lists_and_unknown_fields_may_be_long_and_a_record_may_not(tmp_path: Path) -> None:
    tags = [f"tag {number}" for number in range(10_000)]
    model = {"endpoint_id": "a", "metadata": {"tags": tags}, "new": "x" * 2**20}
    document = {"models": [model], "next_cursor": None, "has_more": False}
    [row] = staged_rows(stage(RESOURCES["models"], json.dumps(document).encode(), tmp_path / "a"))
    assert json.loads(row["tags"]) == tags
    model["new"] = "x" * 36 * 2**20
    with pytest.raises(DataRefusedError, match="one is larger than"):
        stage(RESOURCES["models"], json.dumps(document).encode(), tmp_path / "b")


def test_fields_without_number_are_refused(tmp_path: Path) -> None:
    fields = {f"field{number}": number for number in range(100_000)}
    with pytest.raises(ContractError, match="more than 100 fields that are not known"):
        stage(EVENTS, page(charge(**fields)), tmp_path / "one")
    records = [charge(**{f"field{number}": number}) for number in range(101)]
    with pytest.raises(ContractError, match="more than 100 fields that are not known"):
        stage(EVENTS, page(*records), tmp_path / "each")


# --- What is odd about amounts, and kept ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "is_odd"),
    [
        ({}, False),
        ({"percent_discount": 100, "cost_subtotal": 2, "cost_discount": 2, "cost_total": 0}, False),
        ({"unit_price": 0, "cost_subtotal": 0, "cost_discount": 0, "cost_total": 0}, False),
        ({"cost_subtotal": 1, "cost_discount": 0.5}, True),
        ({"cost_estimate_nano_usd": 90_000_000}, False),
        ({"cost_total": 0.0900000004, "cost_estimate_nano_usd": 90_000_000}, False),
        ({"cost_total": 0.0900000006, "cost_estimate_nano_usd": 90_000_000}, True),
        ({"cost_estimate_nano_usd": 90_000_001}, True),
    ],
)
def test_costs_that_contradict_each_other_are_kept_and_counted(
    changed: dict[str, Any], is_odd: bool, tmp_path: Path
) -> None:
    record = charge(**changed)
    staged = stage(EVENTS, page(record), tmp_path)
    assert staged.doubtful_rows == is_odd
    assert Decimal(staged.cost_total) == Decimal(str(record["cost_total"]))


@pytest.mark.parametrize(
    ("changed", "is_odd"),
    [
        ({}, False),
        ({"percent_discount": None, "cost_total": 40}, False),
        ({"cost_total": 36.0361}, False),
        ({"cost_total": 36.0362}, True),
        ({"cost_total": 40}, True),
        ({"quantity": 5}, True),
        ({"cost_subtotal": None, "quantity": 5}, False),  # before July 2026 discounts were not told
        ({"quantity": 10**25, "unit_price": 10**12}, True),
    ],
)
def test_a_cost_that_is_not_that_of_quantity_price_and_discount_is_kept_and_counted(
    changed: dict[str, Any], is_odd: bool, tmp_path: Path
) -> None:
    row = {"endpoint_id": "a", "unit": "u", "quantity": 4, "unit_price": 10, "percent_discount": 10,
           "cost_subtotal": 40, "cost_discount": None, "cost_total": 36, "currency": "USD"}  # fmt: skip
    series = [{"bucket": f"{DAY}T05:00:00Z", "results": [row | changed]}]
    document = {"time_series": series, "next_cursor": None, "has_more": False}
    staged = stage(RESOURCES["usage"], json.dumps(document).encode(), tmp_path)
    assert staged.doubtful_rows == is_odd
