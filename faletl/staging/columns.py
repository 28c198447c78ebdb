"""SQL of one column: its text, its cast, and the reasons why it may be refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from faletl.duck import decimal_of, text_of
from faletl.money import DECIMAL_TYPE, LARGEST, SCALE
from faletl.resources import Column, Kind, Resource
from faletl.staging.contract import Tree

TOTALS = ("before", "proof")
"""The walks that ask for fal's control total, before the rows and after them."""


def breach_expression(columns: tuple[Column, ...], more: Sequence[tuple[str, str]]) -> str:
    """Return SQL for why a record violates fal's contract, with `more` reasons; empty if it does not."""
    rules = [*more, *(breach for column in columns for breach in breaches(column))]
    is_breach = " or ".join(f"({predicate})" for predicate, _ in rules)
    reasons = ", ".join(f"case when {predicate} then {reason} end" for predicate, reason in rules)
    return f"case when {is_breach} then concat_ws('; ', {reasons}) else '' end"


def contradictions(resource: Resource, label: str) -> list[tuple[str, str]]:
    """Return SQL for when rows with the same key contradict each other, and for the sentence.

    An answer to ids has each id once. In a list that is walked, a row may come again on another page,
    and the later one counts; twice on one page is a contradiction. Rows that may repeat have no rule.
    """
    if resource.repeats or label in TOTALS:
        return []
    names = ", ".join(f'"{column.name}"' for column in resource.columns)
    values = f"hash({names})"
    page = "" if resource.ids_per_call else "_page, "
    among = f"over (partition by {page}{', '.join(resource.key)})"
    sentence = f"'the same {', '.join(resource.key)} comes twice, with other values'"
    return [(f"min({values}) {among} <> max({values}) {among}", sentence)]


def unusable_expression(columns: tuple[Column, ...]) -> str:
    """Return SQL for measured values that stay empty although fal sent something; usually empty."""
    descriptions = [
        f'case when "text of {name}" is not null and "{name}" is null '
        f"then '{name} ' || left(\"text of {name}\", 80) end"
        for name in (column.name for column in columns if column.kind is Kind.SECONDS)
    ]
    return f"concat_ws('; ', {', '.join(descriptions)})" if descriptions else "''"


def read_type(tree: Column | Tree | None) -> str:
    """Return the type in which DuckDB reads a JSON field: every scalar as its text."""
    if not isinstance(tree, dict):
        return "varchar"
    inner = ", ".join(f'"{name}" {read_type(child)}' for name, child in tree.items())
    return f"struct({inner})"


# A time without an offset could be of any zone, so it is refused. No zone is 15 hours off UTC.
_INSTANT_TEXT = r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?([Zz]|[+-](0\d|1[0-4])(:?[0-5]\d)?)"


_FLAWS = {
    Kind.AMOUNT: f"must be a number below 10^{len(str(LARGEST)) - 1} that does not round to zero",
    Kind.WHOLE: "is not a whole number",
    Kind.INSTANT: "is not an instant with an offset",
}


def field(column: Column) -> str:
    """Return SQL for a field as DuckDB reads it."""
    steps = ".".join(f'"{step}"' for step in column.steps)
    return steps if column.is_outer or column.is_asked else f"record.{steps}"


def original_text(column: Column) -> str:
    """Return SQL for the text of a field, or of the older field that had its value."""
    own = field(column)
    return f'coalesce({own}, record."{column.fallback}")' if column.fallback else own


def _cast(text: str, column: Column, *, is_bounded: bool) -> str:
    """Return SQL for the text of a field as its type; null where the value would change.

    A database rounds numbers with too many decimals, so the decimals of longer texts are counted.
    `is_bounded`: see `decimal_of`.
    """
    point = f"strpos({text}, '.')"
    is_plain = f"{text} >= '0' and {text} < ':' and not contains({text}, 'e')"
    match column.kind:
        case Kind.AMOUNT | Kind.WHOLE if column.is_level:
            size = _cast(f"ltrim({text}, '-')", replace(column, is_level=False), is_bounded=is_bounded)
            return f"case when {text} < '0' then -({size}) else {size} end"
        case Kind.AMOUNT | Kind.SECONDS:
            is_short = f"strlen({text}) <= {len('0.') + SCALE}"
            is_good = (
                f"{is_plain} and ({is_short} or {point} = 0 or strlen({text}) - {point} <= {SCALE})"
            )
            # DuckDB writes numbers below a ten-thousandth as 1.5e-06: a digit, decimals, an exponent.
            mantissa, exponent = (f"split_part({text}, 'e-', {part})" for part in (1, 2))
            decimals = f"greatest(strlen({mantissa}) - 2, 0) + try_cast({exponent} as integer)"
            is_tiny = f"{text} >= '0' and {text} < ':' and {decimals} <= {SCALE}"
            decimal = decimal_of(text, is_bounded=is_bounded)
            return f"case when {is_good} then {decimal} when {is_tiny} then {decimal} end"
        case Kind.WHOLE:
            is_digits = f"{is_plain} and not contains({text}, '.')"
            is_whole = f"{is_plain} and ltrim(substr({text}, {point} + 1), '0') = ''"
            before = f"split_part({text}, '.', 1)"
            return (
                f"case when {is_digits} then try_cast({text} as bigint) "
                f"when {is_whole} then try_cast({before} as bigint) end"
            )
        case Kind.INSTANT:  # DuckDB cuts the digits after the microsecond
            is_good = f"regexp_full_match({text}, '{_INSTANT_TEXT}')"
            return f"case when {is_good} then try_cast({text} as timestamptz) end"
        case _:
            return text


def typed_expression(column: Column, *, is_bounded: bool) -> str:
    """Return SQL for the typed value of a column, from its own field or from its older one."""
    own = field(column)
    if not column.fallback:
        return _cast(own, column, is_bounded=is_bounded)
    is_scaled = column.fallback_scale != "1"
    older = _cast(f'record."{column.fallback}"', column, is_bounded=is_bounded and not is_scaled)
    if is_scaled:
        older = f"cast({older} * {column.fallback_scale} as {DECIMAL_TYPE})"
    own_value = _cast(own, column, is_bounded=is_bounded)
    return f"case when {own} is null then {older} else {own_value} end"


def breaches(column: Column) -> Iterator[tuple[str, str]]:
    """Yield the rules of a field: SQL for a breach, and for its sentence. Only one is true at a time."""
    text, typed = f'"text of {column.name}"', f'"{column.name}"'
    shown = f"left({text}, 80)"
    if column.required:
        yield f"{text} is null", f"'{column.name} is missing'"
    has_sign = column.kind in (Kind.AMOUNT, Kind.WHOLE) and not column.is_level
    if has_sign:
        yield f"{text} < '0'", f"'{column.name} is negative: ' || {shown}"
    if column.kind in _FLAWS:
        is_present = f"{text} >= '0'" if has_sign else f"{text} is not null"
        yield f"{typed} is null and {is_present}", f"'{column.name} {_FLAWS[column.kind]}: ' || {shown}"
    if column.at_most is not None:
        yield (
            f"{typed} > {column.at_most}",
            f"'{column.name} is more than {column.at_most}: ' || {shown}",
        )
    if column.kind is Kind.TEXT:
        if not column.may_be_empty:
            yield f"{text} = ''", f"'{column.name} is empty'"
        too_long = f"{column.name} is longer than {column.longest:,} bytes"
        yield f"strlen({text}) > {column.longest}", f"'{too_long}'"


def value(column: Column) -> str:
    """Return SQL for a typed value whose text is the same in all time zones and decimal widths."""
    match column.kind:
        case Kind.AMOUNT | Kind.SECONDS:
            return text_of(f'"{column.name}"')
        case Kind.INSTANT:
            return f'epoch_us("{column.name}")'
        case _:
            return f'"{column.name}"'
