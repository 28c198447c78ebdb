"""Amounts: what a JSON number's text becomes, exactly, and what is given back to be refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from operator import add, mul
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from faletl.money import EXACT_TEXT, LONGEST, PRECISION, SCALE, exact_text, plain

HALF = Decimal(5).scaleb(-SCALE - 1)

ATOMS = st.one_of(st.integers(0, 10**PRECISION - 1), st.integers(0, 10**15))
"""Amounts that a column can hold, counted in units of the twelfth decimal."""


def exact(text: str) -> Decimal:
    """The value of a text, whatever its length."""
    with localcontext(prec=5000):
        return +Decimal(text)


def is_held(text: str) -> bool:
    return re.fullmatch(EXACT_TEXT, text, re.ASCII) is not None


@st.composite
def notations(draw: st.DrawFn) -> tuple[Decimal, str]:
    """An amount that can be held, and one of the ways in which JSON may write it."""
    atoms = draw(ATOMS)
    with localcontext(prec=200):
        value = Decimal(atoms).scaleb(-SCALE)
        shift = draw(st.integers(-40, 40))
        mantissa = f"{value.scaleb(-shift):f}"
    if draw(st.booleans()) and "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    zeros = "0" * draw(st.integers(0, 30))
    if zeros:
        mantissa += zeros if "." in mantissa else f".{zeros}"
    sign = draw(st.sampled_from(["", "+"])) if shift >= 0 else ""
    exponent = "" if shift == 0 else f"{draw(st.sampled_from('eE'))}{sign}{shift}"
    return value, mantissa + exponent


@given(notations())
def test_an_amount_that_fits_survives_exactly_whatever_its_notation(
    written: tuple[Decimal, str],
) -> None:
    value, text = written
    held, is_rounded = exact_text(text)
    assert is_held(held)
    assert exact(held) == value
    assert not is_rounded


@given(ATOMS)
def test_a_text_that_fits_already_is_left_as_it_is(atoms: int) -> None:
    with localcontext(prec=60):
        text = f"{Decimal(atoms).scaleb(-SCALE):f}"
    assert exact_text(text) == (text, False)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 26 + "." + "9" * 12,
        "12345678901234567890123456.123456789012",
        "1234567890123456789012345612345678901.2e-11",
        "9007199254740993",  # 2**53 + 1, the first whole number that a double lacks
        "9007199254740993e-12",
        "0.123456789012e3",
        "1.2345678901234567e5",
    ],
)
def test_digits_beyond_those_of_a_double_are_kept(text: str) -> None:
    held, is_rounded = exact_text(text)
    assert (exact(held), is_rounded) == (exact(text), False)
    assert is_held(held)


@given(ATOMS.filter(bool), st.data())
def test_noise_smaller_than_a_double_could_tell_is_rounded_off_and_counted(
    atoms: int, data: st.DataObject
) -> None:
    with localcontext(prec=200):
        meant = Decimal(atoms).scaleb(-SCALE)
        # A neighbour of `meant` may lie in the binade below, where doubles are twice as close.
        most = min(HALF, Decimal(math.ulp(float(meant))) / 2)
        share = data.draw(st.integers(-9_999, 9_999).filter(bool))
        noisy = meant + most * share / 10_000
        held, is_rounded = exact_text(f"{noisy:f}")
        assert exact(held) == meant
    assert is_rounded
    assert is_held(held)


@pytest.mark.parametrize(
    ("number", "held"),
    [
        (0.1 + 0.2, "0.3"),
        (0.1 + 0.7, "0.8"),
        (1.1 + 2.2, "3.3"),
        (3 * 0.1, "0.3"),
        (3 * 1.1, "3.3"),
        (0.07 * 3, "0.21"),
        (0.57 * 100, "57"),
        (4.35 * 100, "435"),
        (1 - 0.9, "0.1"),
        (1.1 * 1.1, "1.21"),
    ],
)
def test_the_noise_of_a_servers_floats_is_rounded_off_and_counted(number: float, held: str) -> None:
    assert exact_text(repr(number)) == (held, True)


FEW_DECIMALS = st.tuples(st.integers(1, 10**6), st.integers(0, 6))


@given(FEW_DECIMALS, FEW_DECIMALS, st.sampled_from([add, mul]))
@example((29, 2), (14, 2), add)
@example((15229, 2), (36465, 5), mul)
def test_one_sum_or_product_of_floats_is_held_as_if_it_were_exact(
    one: tuple[int, int],
    other: tuple[int, int],
    calculate: Callable[[Any, Any], Any],
) -> None:
    amounts = [Decimal(digits).scaleb(-decimals) for digits, decimals in (one, other)]
    meant = calculate(*amounts)
    assume(meant < 1000)  # beyond it, noise reaches the twelfth decimal
    held, _ = exact_text(repr(calculate(*map(float, amounts))))
    assert is_held(held)
    assert exact(held) == meant


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("4096.0000000000005", "4096"),
        ("4096.0000000000015", "4096.000000000002"),
        ("4096.0000000000025", "4096.000000000002"),
        ("4096.00000000000250000001", "4096.000000000003"),
        ("1048576.12345678901249", "1048576.123456789012"),
    ],
)
def test_noise_in_the_middle_goes_to_the_even_digit(text: str, held: str) -> None:
    assert exact_text(text) == (held, True)


@given(st.integers(1, 10**15 - 1), st.integers(SCALE + 1, 60))
@example(123456789012341, 13)
def test_more_than_twelve_decimals_that_are_meant_are_given_back(digits: int, decimals: int) -> None:
    digits += digits % 10 == 0  # the last decimal is none that could be dropped
    with localcontext(prec=200):
        text = f"{Decimal(digits).scaleb(-decimals):f}"
    assert exact_text(text) == (text, False)
    assert not is_held(text)


@pytest.mark.parametrize(
    "text",
    [
        "1e999",
        "1e-400",
        "1e-13",
        "-1",
        "-0.5",
        "-1e-400",
        "-0.30000000000000004",
        "1" + "0" * 26,
        "1e26",
        "12.34567890123415",  # off by more than the fifteenth digit, if only by half of one more
        "99999999999999999999999999.9999999999999",  # would round up to one digit too many
        "7" * 600,
        "NaN",
        "Infinity",
        "1e",
        ".5",
        "5.",
        "+1",
        "1,5",
        "1_000",
        " 1",
        "0x10",
        "٣",
        "",
        "null",
        "1e99999999999",
        "1\n",
    ],
)
def test_what_cannot_be_held_is_given_back_and_never_looks_held(text: str) -> None:
    assert exact_text(text) == (text, False)
    assert not is_held(text)


@pytest.mark.parametrize(
    "text", ["-0", "-0.0", "-0e5", "0e0", "0e999", "0e-999", "-0.000000000000000", "0.0e+1"]
)
def test_every_zero_is_zero(text: str) -> None:
    held, is_rounded = exact_text(text)
    assert is_held(held)
    assert (exact(held), is_rounded) == (Decimal(0), False)
    assert not held.startswith("-")


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_the_text_of_any_float_is_held_to_the_twelfth_decimal_or_given_back(number: float) -> None:
    text = repr(number)
    held, is_rounded = exact_text(text)
    if not is_held(held):
        assert (held, is_rounded) == (text, False)
        return
    with localcontext(prec=400):
        value = Decimal(text)
        nearest = value.quantize(Decimal(1).scaleb(-SCALE), rounding=ROUND_HALF_EVEN)
    assert exact(held) == nearest
    assert is_rounded == (nearest != value)


@given(st.text(alphabet="0123456789.eE+-", max_size=50))
def test_any_text_is_held_or_given_back_unchanged(text: str) -> None:
    held, is_rounded = exact_text(text)
    assert is_held(held) or (held, is_rounded) == (text, False)


@pytest.mark.parametrize(("length", "held"), [(LONGEST, "1"), (LONGEST + 1, None)])
def test_a_number_may_be_written_only_so_long(length: int, held: str | None) -> None:
    text = f"1.{'0' * (length - 2)}"
    assert exact_text(text) == (held or text, False)


@pytest.mark.parametrize(
    ("amount", "text"),
    [("0", "0"), ("0.000000000000", "0"), ("1E+3", "1000"), ("1E-12", "0.000000000001"),
     ("1200.50", "1200.5"), ("100", "100"), ("-0.10", "-0.1")],
)  # fmt: skip
def test_an_amount_is_shown_in_plain_digits(amount: str, text: str) -> None:
    assert plain(Decimal(amount)) == text
