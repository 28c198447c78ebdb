"""The fast way of a page through staging keeps every number as it was written, or is not taken."""

from __future__ import annotations

import json
import re
import tempfile
from decimal import Decimal
from pathlib import Path

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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(token=tokens)
@example("0.1")
@example("1e-7")
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
