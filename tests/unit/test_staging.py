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
@example("2.6006458333333335")
@example("1.736111111111111e-05")
@example("0.12345678901250")
@example("1.23E-10")
@example("0.0000123456789012")
@example("0.1234567890124999999999999999999999999999999999")
@example("999999999999999.9999999999994")
@example("999999999999999.9999999999995")
@example("1e15")
@example("5e-13")
@example("-0.0")
@example("-0")
def test_a_number_is_kept_to_the_twelfth_decimal_of_its_text_or_refused(token: str) -> None:
    kept, is_rounded = exact_text(token)
    is_amount = re.fullmatch(EXACT_TEXT, kept) is not None
    for sent in (token, token.upper()):
        with tempfile.TemporaryDirectory() as folder:
            if not is_amount:
                with pytest.raises(DataRefusedError, match=r"below 10\^15|out of range"):
                    stage(EVENTS, body(sent), Path(folder))
                continue
            row = staged_rows(staged := stage(EVENTS, body(sent), Path(folder)))[0]
        assert row["quantity"] == Decimal(kept)
        assert staged.rounded_amounts == is_rounded
        assert is_rounded or row["quantity"] == Decimal(token)
        assert row["endpoint_id"] == "a/b\u2028c"


@pytest.mark.parametrize("blank", [" ", "\n", "\t ", "\r\n"])
def test_a_long_number_is_exact_wherever_json_may_have_blanks(blank: str, tmp_path: Path) -> None:
    amount = "0.123456789012345678901234567890"
    for number, around in enumerate((f'{blank}"quantity":{amount}', f'"quantity"{blank}:{amount}',
                                     f'"quantity":{blank}{amount}{blank}')):  # fmt: skip
        sent = body("2").replace(b'"quantity": 2', around.encode())
        staged = stage(EVENTS, sent, tmp_path / str(number))
        assert staged_rows(staged)[0]["quantity"] == Decimal("0.123456789012")
        assert staged.rounded_amounts == 1


def test_only_amounts_that_are_loaded_are_counted_as_rounded(tmp_path: Path) -> None:
    third = 124831 / 48000
    sent = page(charge(quantity=third, output_units=third, new_field=third, request_id=f'"x":{third}'))
    staged = stage(EVENTS, sent, tmp_path)
    [row] = staged_rows(staged)
    assert row["quantity"] == row["output_units"] == Decimal("2.600645833333")
    assert row["request_id"] == f'"x":{third}'
    assert staged.rounded_amounts == 2
    model = {"models": [{"endpoint_id": "a", "metadata": {"duration_estimate": third}}]}
    document = json.dumps({**model, "next_cursor": None, "has_more": False}).encode()
    assert stage(RESOURCES["models"], document, tmp_path / "models").rounded_amounts == 0


def test_a_charge_of_a_million_dollars_is_taken_from_its_nano_dollars(tmp_path: Path) -> None:
    nano = 1_234_567_890_123_456_789
    sent = page(charge(cost_total=None, cost_estimate_nano_usd=nano))
    [row] = staged_rows(stage(EVENTS, sent, tmp_path))
    assert row["cost_total"] == Decimal("1234567890.123456789")
    assert row["cost_estimate_nano_usd"] == nano


@pytest.mark.parametrize("nano", ["2600646.5", "1e-1", "9223372036854775808"])
def test_nano_dollars_are_whole_or_refuse_their_row(nano: str, tmp_path: Path) -> None:
    sent = page(charge(cost_estimate_nano_usd="nano")).replace(b'"nano"', nano.encode())
    with pytest.raises(DataRefusedError, match="cost_estimate_nano_usd is not a whole number"):
        stage(EVENTS, sent, tmp_path)


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        (b'"quantity": 2,', b'"quantity": 2, "quantity": 3,'),
        (b'"quantity": 2,', b'"quantity" : 2, "quantity":3,'),
        (b'"quantity": 2,', b'"quantity": 2, "quantit\\u0079": 3,'),
        (b'"quantity": 2,', b'"quantity": 2, "quantity": 3, "unknown too": "\\u0022\\u0022",'),
        (b'{"billing_events"', b'{"billing_events" :\n [], "billing_events"'),
        (b'{"billing_events"', b'{"billing_event\\u0073": [], "billing_events"'),
        (b'{"billing_events"', b'{"x": {"y": 1, "y": 1}, "billing_events"'),
        (b'"has_more": false', b'"has_more": false, "n": 1%s, "n": 2' % (b"0" * 5000)),
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
    with pytest.raises(DataRefusedError, match="timestamp is not an instant with an offset"):
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
    for count, said in ((5_000, "more than 100 unknown fields"),
                        (100_000, "more than 10,000 fields in one object")):  # fmt: skip
        fields = {f"field{number}": number for number in range(count)}
        with pytest.raises(ContractError, match=said):
            stage(EVENTS, page(charge(**fields)), tmp_path / f"one-{count}")
    records = [charge(**{f"field{number}": number}) for number in range(101)]
    with pytest.raises(ContractError, match="more than 100 unknown fields"):
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
        ({"quantity": 10**15 - 1, "unit_price": 10**15 - 1}, True),
        (
            {
                "quantity": 10**15 - 1,
                "unit_price": 1,
                "cost_subtotal": 10**15 - 1,
                "percent_discount": None,
                "cost_total": 10**15 - 1,
            },
            False,
        ),
        ({"quantity": 1e-12, "unit_price": 10**15 - 1, "cost_subtotal": 1000, "cost_total": 900}, False),
        ({"quantity": 1e-12, "unit_price": 10**15 - 1, "cost_subtotal": 900, "cost_total": 810}, True),
        ({"percent_discount": 0, "cost_total": 40}, False),
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


# --- Where one odd row decides for itself alone ---------------------------------------------------

PRICES, MODELS, ANALYTICS, CREDITS = (RESOURCES[n] for n in ("prices", "models", "analytics", "credits"))


def prices(*records: str) -> bytes:
    """A page of the price list."""
    listed = ",".join(records)
    return f'{{"prices": [{listed}], "next_cursor": null, "has_more": false}}'.encode()


def price(endpoint_id: str, amount: str, unit: str = "images") -> str:
    """A line of the price list; the amount is JSON."""
    rest = f'"unit": "{unit}", "unit_price": {amount}, "currency": "USD"'
    return f'{{"endpoint_id": "{endpoint_id}", {rest}}}'


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (price("b", "null"), "unit_price is null"),
        (price("b", "NaN"), "unit_price is text where a number belongs"),
        (price("b", "-Infinity"), "unit_price is text where a number belongs"),
        (price("b", '"0.1"'), "unit_price is text where a number belongs"),
        (price("b", "-1"), "unit_price is negative: -1"),
        (price("b", "1e15"), "unit_price must be a number below 10^15 that does not round to zero"),
        (price("b", "1e-13"), "unit_price must be a number below 10^15 that does not round to zero"),
        (price("b", "1e999"), "unit_price is out of range"),
        (price("", "1"), "endpoint_id is empty"),
        ('{"endpoint_id": "b"}', "unit is missing"),
        (price("b", '1, "endpoint_id": "b"'), "has the key 'endpoint_id' twice in one object"),
        ("null", "the row is null"),
        ("[]", "the row is a list where an object belongs"),
    ],
)
def test_one_odd_price_is_quarantined_and_the_others_are_loaded(
    odd: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    staged = stage(PRICES, prices(price("a", "0.5"), odd, price("c", "1")), tmp_path)
    assert [row["endpoint_id"] for row in staged_rows(staged)] == ["a", "c"]
    assert staged.proof == "none"
    [quarantined] = staged.findings.quarantined
    assert (quarantined.page, quarantined.row, staged.findings.breaches) == (1, 2, 1)
    assert why in quarantined.reason
    assert quarantined.raw_json.replace('"NaN"', "NaN").replace('"-Infinity"', "-Infinity") == odd
    assert "they are quarantined and the others are loaded" in caplog.text
    if quarantined.endpoint_id:
        assert f"page 1 row 2 ({quarantined.endpoint_id}): " in caplog.text


def test_a_price_list_that_contradicts_itself_of_one_endpoint_is_taken_of_the_others(
    tmp_path: Path,
) -> None:
    twice = (price("b", "0.04"), price("b", "0.5", "seconds"))
    staged = stage(PRICES, prices(price("a", "0.5"), *twice, price("c", "1"), price("c", "1")), tmp_path)
    assert [row["endpoint_id"] for row in staged_rows(staged)] == ["a", "c"]
    assert [one.row for one in staged.findings.quarantined] == [2, 3]
    assert "the same endpoint_id comes twice, with other values" in staged.findings.quarantined[0].reason
    assert staged.repeated_rows == 1  # the same price again is the same price


def test_an_odd_model_is_quarantined_and_the_others_are_loaded(tmp_path: Path) -> None:
    models = [
        {"endpoint_id": "a", "metadata": {"display_name": "A"}},
        {"endpoint_id": "b", "metadata": {"display_name": 5}},
        {"endpoint_id": None, "metadata": None},
        {"endpoint_id": "c", "metadata": {"category": "x"}},
        {"endpoint_id": "c", "metadata": {"category": "y"}},
        {"endpoint_id": "d", "metadata": None},
    ]
    document = {"models": models, "next_cursor": None, "has_more": False}
    staged = stage(MODELS, json.dumps(document).encode(), tmp_path)
    assert [row["endpoint_id"] for row in staged_rows(staged)] == ["a", "d"]
    assert [one.row for one in staged.findings.quarantined] == [2, 3, 4, 5]


def analytics(*records: str) -> bytes:
    """A page of a bucket's requests; the records are JSON."""
    bucket = f'{{"bucket": "{DAY}T05:00:00Z", "results": [{",".join(records)}]}}'
    return f'{{"time_series": [{bucket}], "next_cursor": null, "has_more": false}}'.encode()


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "null", '"soon"', "true", "{}", "-1", "1e15", "1e-13", "1e999"],
)
def test_a_duration_that_is_none_is_empty_and_its_row_is_loaded(
    value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = f'{{"endpoint_id": "b", "request_count": 7, "p50_duration": {value}, "p75_duration": 2.5}}'
    good = '{"endpoint_id": "a", "request_count": 1, "p50_duration": 0.12345678901234567}'
    staged = stage(ANALYTICS, analytics(good, odd), tmp_path)
    first, second = staged_rows(staged)
    assert (first["p50_duration"], second["p50_duration"]) == (Decimal("0.123456789012"), None)
    assert (second["request_count"], second["p75_duration"]) == (7, Decimal("2.5"))
    assert staged.findings.breaches == 0
    is_said = "values that cannot be used and stay empty (page 1 row 2 (b): p50_duration" in caplog.text
    assert is_said == (value != "null")
    retyped = [(one.field, one.kind) for one in staged.findings.drifts if one.kind != "missing"]
    is_number = value.lstrip("-")[:1].isdigit() or value == "null"
    assert retyped == ([] if is_number else [("p50_duration", "retyped")])


@pytest.mark.parametrize("value", ["0.5", "-1", "NaN", "true", "1000000000000001"])
def test_an_odd_count_quarantines_its_row_alone(value: str, tmp_path: Path) -> None:
    good, odd = (
        f'{{"endpoint_id": "{name}", "request_count": {count}, "success_count": 1}}'
        for name, count in (("a", 1), ("b", value))
    )
    staged = stage(ANALYTICS, analytics(good, odd), tmp_path)
    assert [row["endpoint_id"] for row in staged_rows(staged)] == ["a"]
    assert [one.endpoint_id for one in staged.findings.quarantined] == ["b"]


def account(credit: str) -> bytes:
    """The answer about the account; its credits are JSON."""
    return f'{{"username": "acme", "credits": {credit}}}'.encode()


@pytest.mark.parametrize(
    ("balance", "kept"),
    [
        ("97.39741458333333", "97.397414583333"),
        ("-0.18", "-0.18"),
        ("-0.30000000000000004", "-0.3"),
        ("-1.5e-05", "-0.000015"),
        ("-999999999999999.999999999999", "-999999999999999.999999999999"),
        ("0", "0"),
        ("-0.0", "0"),
        ('"6.92"', "6.92"),
        ('"-6.92"', "-6.92"),
        ('"97.39741458333333333"', "97.397414583333"),
        ('"1e2"', "100"),
    ],
)
def test_a_balance_of_any_sign_is_a_reading(balance: str, kept: str, tmp_path: Path) -> None:
    staged = stage(CREDITS, account(f'{{"current_balance": {balance}, "currency": "USD"}}'), tmp_path)
    [row] = staged_rows(staged)
    assert row["current_balance"] == Decimal(kept)
    drifts = [(one.field, one.kind) for one in staged.findings.drifts]
    assert drifts == ([("credits.current_balance", "retyped")] if balance[0] == '"' else [])
    assert staged.rounded_amounts == (len(balance.strip('"-')) > 14 and not balance.startswith("-9"))


@pytest.mark.parametrize("sent", ['{"username": "acme"}', *(
    account(credit).decode() for credit in ("null", "{}", '{"current_balance": null, "currency": "USD"}')
)])  # fmt: skip
def test_without_a_balance_there_is_no_reading_and_one_sentence(
    sent: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    staged = stage(CREDITS, sent.encode(), tmp_path)
    assert staged_rows(staged) == []
    assert staged.findings.breaches == 0
    assert staged.findings.drifts == ()
    [said] = caplog.messages
    assert "fal sent no current_balance, so there is nothing to load" in said


@pytest.mark.parametrize("balance", ["NaN", '"much"', '"0x10"', "true", "1e15", "-1e15", "1e-13"])
def test_a_balance_that_is_no_number_is_quarantined(balance: str, tmp_path: Path) -> None:
    staged = stage(CREDITS, account(f'{{"current_balance": {balance}, "currency": "USD"}}'), tmp_path)
    assert staged_rows(staged) == []
    [quarantined] = staged.findings.quarantined
    assert "current_balance" in quarantined.reason
