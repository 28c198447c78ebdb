"""Accounts as fal may hold them: what the properties draw lines, charges and amounts from.

Amounts are doubles in the digits that fal's encoder writes: whole numbers, short decimals, quotients of
up to 17 digits (samples, frames, seconds of an hour's price) and such as 1e-05.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from decimal import Decimal

from hypothesis import strategies as st

from faletl.sandbox import UsageLine
from tests import truth
from tests.truth import FLUX, KEY, LOGIN, NOBODY, NOW, VIDEO, VOICE, line

RATES = (24, 30, 60, 3600, 48_000)
"""Into how many parts fal cuts a unit: frames and samples a second, seconds a minute and an hour."""

ENDPOINTS = (FLUX, VIDEO, VOICE, "x/é", "x/e\u0301", "x/'; DROP TABLE raw.usage; --")
UNITS = ("images", "image", "", "1000 characters ", "30 frames", "seconds")
PRICES = ("0.025", "0.0007", "0.4", "1e-05", *(repr(an_hour / 3600) for an_hour in (0.99, 4.49, 6.25)))
DISCOUNTS = (None, "0", "10", "12.5")

hours = st.builds(
    lambda day, hour: datetime(2026, 11, day, hour, tzinfo=NOW.tzinfo),
    st.integers(21, 23),
    st.integers(0, 23),
)
quotients = st.builds(lambda n, d: Decimal(repr(n / d)), st.integers(1, 10**7), st.sampled_from(RATES))
quantities = st.one_of(
    quotients,
    st.integers(1, 10**6).map(Decimal),
    st.decimals("0.0001", 10**6, places=4),
)
"""More than none, so that a row that costs something leaves a trace in a control total if it is lost."""


def lines_of(
    quantities: st.SearchStrategy[Decimal],
    prices: tuple[str, ...],
    discounts: tuple[str | None, ...],
    currencies: tuple[str, ...],
) -> st.SearchStrategy[UsageLine]:
    """Lines of three days that are drawn from these."""
    return st.builds(
        line,
        hours,
        st.sampled_from(ENDPOINTS),
        quantities,
        st.sampled_from(prices),
        unit=st.sampled_from(UNITS),
        percent_discount=st.sampled_from(discounts),
        currency=st.sampled_from(currencies),
        credential=st.sampled_from([KEY, LOGIN, NOBODY]),
    )


paid_lines = lines_of(quantities, PRICES, DISCOUNTS, ("USD",))
lines = lines_of(
    quantities | st.just(Decimal(0)), ("0", *PRICES), (*DISCOUNTS, "100"), ("USD", "USD", "EUR")
)
accounts = st.lists(lines, max_size=12).map(lambda found: replace(truth.two_days(), lines=found))
"""An account of those lines alone; its charges follow from them (tests/truth.py)."""
