"""Amounts: what a JSON number's text becomes, exactly, and what is given back to be refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from operator import add, mul
from typing import Any

import duckdb
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from faletl.duck import decimal_of
from faletl.money import (
    DECIMAL_TYPE,
    EXACT_TEXT,
    LARGEST,
    PRODUCT_TYPE,
    SCALE,
    exact_text,
    has_long_number,
    plain,
    product_of,
    with_exact_numbers,
)

HALF = Decimal(5).scaleb(-SCALE - 1)

ATOMS = st.one_of(st.integers(0, LARGEST * 10**SCALE - 1), st.integers(0, 10**15))
"""Amounts that a column can hold, counted in units of the twelfth decimal."""


def exact(text: str) -> Decimal:
    """The value of a text, whatever its length."""
    with localcontext(prec=20_000):
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
    sign = "-" if shift < 0 else draw(st.sampled_from(["", "+"]))
    leading = "0" * draw(st.integers(0, 3))
    exponent = "" if shift == 0 else f"{draw(st.sampled_from('eE'))}{sign}{leading}{abs(shift)}"
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
        "9" * 15 + "." + "9" * 12,
        "123456789012345.123456789012",
        "12345678901234512345678901.2e-11",
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


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("2.6006458333333335", "2.600645833333"),  # 124831 / 48000, as fal sends it
        ("0.001736111111111111", "0.001736111111"),
        ("1.736111111111111e-05", "0.000017361111"),
        ("123.45678901234567", "123.456789012346"),
        ("12.34567890123415", "12.345678901234"),
        ("0.0123456789015123456789012345678901234567", "0.012345678902"),
        ("0.5000000000005", "0.5"),
        ("0.5000000000015", "0.500000000002"),
        ("0.00000000000050000001", "0.000000000001"),
        ("999999999999999.9999999999994", "999999999999999.999999999999"),
        ("-0.30000000000000004", "-0.3"),
        pytest.param(f"1.{'0' * 5000}1", "1", id="many decimals"),
        pytest.param(f"0.{'0' * 5000}1e5001", "1", id="many decimals and a large exponent"),
        pytest.param(f"5{'0' * 5000}e-5000", "5", id="many digits and a small exponent"),
    ],
)
def test_more_than_twelve_decimals_are_rounded_half_even_and_counted(text: str, held: str) -> None:
    assert exact_text(text) == (held, exact(text) != exact(held))


@pytest.mark.parametrize(
    "text",
    [
        "1e999",
        "1e-400",
        "1e-13",
        "5e-13",  # half of the last decimal goes to the even one, which is zero
        "-1e-400",
        "-2.7755575615628914e-17",
        "1" + "0" * 26,
        "1e26",
        "7" * 600,
        "1e1000000000000000000000",
        "1e-1000000000000000000000",
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
    "text",
    ["-0", "-0.0", "-0e5", "0e0", "0e999", "0e-999", "-0.000000000000000", "0.0e+1", f"0e{'9' * 40}"],
)
def test_every_zero_is_zero(text: str) -> None:
    held, is_rounded = exact_text(text)
    assert is_held(held)
    assert (exact(held), is_rounded) == (Decimal(0), False)
    assert not held.startswith("-")


@given(st.floats(min_value=0, max_value=LARGEST, exclude_max=True))
def test_the_text_of_any_float_is_held_to_the_twelfth_decimal_unless_that_makes_it_zero(
    number: float,
) -> None:
    text = repr(number)
    held, is_rounded = exact_text(text)
    with localcontext(prec=400):
        value = Decimal(text)
        nearest = value.quantize(Decimal(1).scaleb(-SCALE), rounding=ROUND_HALF_EVEN)
    if value and not nearest:
        assert (held, is_rounded) == (text, False)
        assert not is_held(held) or exact(held) == value
    else:
        assert exact(held) == nearest
        assert is_rounded == (nearest != value)


@given(st.text(alphabet="0123456789.eE+-", max_size=50))
def test_any_text_is_a_number_in_plain_notation_or_given_back(text: str) -> None:
    held, is_rounded = exact_text(text)
    if re.fullmatch(r"-?\d+(\.\d{1,12})?", held, re.ASCII):
        assert abs(exact(held) - exact(text)) <= HALF
        assert is_rounded == (exact(held) != exact(text))
    else:
        assert (held, is_rounded) == (text, False)


@pytest.mark.parametrize(
    ("amount", "text"),
    [("0", "0"), ("0.000000000000", "0"), ("1E+3", "1000"), ("1E-12", "0.000000000001"),
     ("1200.50", "1200.5"), ("100", "100"), ("-0.10", "-0.1")],
)  # fmt: skip
def test_an_amount_is_shown_in_plain_digits(amount: str, text: str) -> None:
    assert plain(Decimal(amount)) == text


# --- In SQL ---------------------------------------------------------------------------------------


def in_duckdb(expression: str, **amounts: str) -> Any:
    """What DuckDB makes of an expression over amounts."""
    given_amounts = ", ".join(
        f"cast('{text}' as {DECIMAL_TYPE}) as {name}" for name, text in amounts.items()
    )
    rows = f" from (select {given_amounts})" if amounts else ""
    with duckdb.connect() as connection:
        found = connection.execute(f"select {expression}{rows}").fetchone()
    return found[0] if found else None


@pytest.mark.parametrize(
    ("text", "is_amount", "is_sum"),
    [("999999999999999.999999999999", True, True), ("1000000000000000", False, True),
     ("-999999999999999.999999999999", True, True), ("99999999999999999999999999", False, True),
     ("100000000000000000000000000", False, False), ("7" * 600, False, False), ("NaN", False, False)],
)  # fmt: skip
def test_an_amount_is_below_ten_to_the_fifteenth_and_a_sum_may_be_larger(
    text: str, is_amount: bool, is_sum: bool
) -> None:
    assert (in_duckdb(decimal_of(f"'{text}'")) is not None) == is_amount
    assert (in_duckdb(decimal_of(f"'{text}'", is_bounded=False)) is not None) == is_sum


SIGNED = st.tuples(st.sampled_from([1, -1]), ATOMS).map(lambda drawn: drawn[0] * drawn[1])


@given(SIGNED, SIGNED)
@example(LARGEST * 10**SCALE - 1, LARGEST * 10**SCALE - 1)
@example(1, LARGEST * 10**SCALE - 1)
def test_a_product_of_any_two_amounts_is_right_to_the_fifth_decimal(one: int, other: int) -> None:
    with localcontext(prec=200):
        a, b = (Decimal(atoms).scaleb(-SCALE) for atoms in (one, other))
        found = in_duckdb(product_of("a", "b"), a=f"{a:f}", b=f"{b:f}")
        assert abs(found - a * b) <= Decimal("0.000002")
    assert in_duckdb(f"typeof({product_of('a', 'b')})", a="1", b="1").lower() == PRODUCT_TYPE


# --- In a page ------------------------------------------------------------------------------------

EXPONENTS = st.builds(
    "{}{}{}".format,
    st.sampled_from("eE"),
    st.sampled_from(["", "-", "+", "-0"]),
    st.integers(0, 400).map(str),
)
TOKENS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "-"]),
    st.integers(0, 10**22).map(str),
    st.just("") | st.text("0123456789", min_size=1, max_size=22).map(".{}".format),
    st.just("") | EXPONENTS,
)
TEXTS = st.text(st.sampled_from('"\\:, {}[]0123456789.eE-\nq'), max_size=30)
NAMES = st.sampled_from(["q", 'q"', "", "quantity"]) | TEXTS
FIELDS = st.lists(st.tuples(NAMES, TOKENS | TEXTS.map(json.dumps)), max_size=6)


class Number(str):
    """The text of a number in a document."""


def fields_of(document: bytes) -> list[tuple[str, Any]]:
    """The names and values of an object, in order."""
    found: list[tuple[str, Any]] = json.loads(
        document, object_pairs_hook=list, parse_float=Number, parse_int=Number
    )
    return found


@given(FIELDS, st.sampled_from([":", ": ", " : ", "\n:"]))
@example([("q", "1e-400")], ":")
@example([('q":0.12345678901234567', '":0.12345678901234567, \\"q\\":0.12345678901234567"')], ":")
def test_numbers_that_a_double_may_not_hold_become_texts_and_nothing_else_does(
    fields: list[tuple[str, str]], colon: str
) -> None:
    body = ("{" + ",".join(f"{json.dumps(name)}{colon}{value}" for name, value in fields) + "}").encode()
    for is_each in (False, True):
        made, rounded = with_exact_numbers(body, {b'"quantity"'}, is_each=is_each)
        expected = 0
        for (name, sent), (same_name, now) in zip(fields_of(body), fields_of(made), strict=True):
            assert name == same_name
            if not isinstance(sent, Number):
                assert (now, type(now)) == (sent, str)
                continue
            held, is_rounded = exact_text(sent)
            is_text = not isinstance(now, Number)
            assert now == (held.lower() if is_text else sent)
            # A name with a backslash in it may be any name.
            expected += is_text and is_rounded and (name == "quantity" or "\\" in json.dumps(name))
            if not is_text and re.search(r"\w$", name, re.ASCII):  # as fal's own names do
                assert not is_each
                assert math.isinf(float(sent)) or exact(repr(float(sent))) == exact(sent)
        assert rounded == expected
        if not is_each and not has_long_number(body):
            assert made == body
