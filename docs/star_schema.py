"""The picture of marts: facts in the middle, dimensions around them, joined by keys that builds check.

The contents come from the SQL: tables and columns from the models, primary keys from their grain, edges
from the joins of the check `keys_resolve`. The layout follows from them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean

import sqlglot
from sqlglot import exp

from faletl.models.catalogue import SOURCE_DIALECT, Model, checks, column_comments, models

RANGES: Mapping[tuple[str, str], str] = {("fct_usage", "dim_price"): "rpt_spend_daily"}
"""Joins that no check can require, as usage may have no list price; and the report that makes each."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A join of a fact to a dimension: pairs of equal columns, and a column within a range of others."""

    fact: str
    dimension: str
    equal: tuple[tuple[str, str], ...]
    within: tuple[str, ...] = ()

    @property
    def label(self) -> list[str]:
        """The key columns, in lines; if two names differ, that of the fact comes first."""
        keys = [ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in self.equal]
        lines = textwrap.wrap(", ".join(keys), LABEL)
        if self.within:
            value, *bounds = self.within
            lines += [f"{value} within", " … ".join(bounds)]
        return lines


# --- Joins in the SQL ----------------------------------------------------------------------------


def edges() -> list[Edge]:
    """Return every join of a fact to a dimension, in the order of the SQL."""
    return [*_checked_edges(), *(_range_edge(*pair, report) for pair, report in RANGES.items())]


def _checked_edges() -> Iterator[Edge]:
    """Yield the joins of each fact to the dimensions whose key columns it has."""
    (sql,) = (check.sql for check in checks() if check.name == "keys_resolve")
    check = sqlglot.parse_one(sql, read=SOURCE_DIALECT, into=exp.Select)
    for fact in check.ctes[0].find_all(exp.Select):
        columns = (s for s in fact.selects if isinstance(s.unalias(), exp.Column))
        columns_by_name = {column.alias_or_name: column.unalias().name for column in columns}
        for join in check.args["joins"]:
            equal = tuple(_equal(join))
            if all(ours in columns_by_name for ours, _ in equal):
                table = next(fact.find_all(exp.Table))
                yield Edge(table.name, join.this.name, tuple((columns_by_name[a], b) for a, b in equal))


def _range_edge(fact: str, dimension: str, report: str) -> Edge:
    """Return the join of a report to its rows of the dimension."""
    (sql,) = (model.sql for model in models() if model.name == report)
    tree = sqlglot.parse_one(sql, read=SOURCE_DIALECT)
    steps = {c.alias: {table.name for table in c.find_all(exp.Table)} for c in tree.find_all(exp.CTE)}
    names = {dimension, *(step for step, read in steps.items() if dimension in read)}
    (join,) = (join for join in tree.find_all(exp.Join) if join.this.name in names)
    compared = [
        column
        for kind in (exp.LT, exp.LTE, exp.GT, exp.GTE)
        for comparison in join.args["on"].find_all(kind)
        for column in comparison.find_all(exp.Column)
    ]
    inside = {column.name: column.table == join.this.alias_or_name for column in compared}
    return Edge(fact, dimension, tuple(_equal(join)), tuple(sorted(inside, key=lambda c: inside[c])))


def _equal(join: exp.Join) -> Iterator[tuple[str, str]]:
    """Yield the pairs of equal columns of a join: ours, and that of the joined table."""
    for one in join.args["on"].find_all(exp.EQ):
        pair = sorted(one.find_all(exp.Column), key=lambda c: c.table == join.this.alias_or_name)
        if len(pair) == 2:
            yield pair[0].name, pair[1].name


# --- Where it is placed ---------------------------------------------------------------------------

ROW, HEAD, GAP, EDGE = 17, 26, 26, 24  # heights of a row and a title; between facts; around all
NAME = 7.3  # width of a letter in a row
LABEL, LETTER, LINE = 24, 6.6, 13  # letters in a line of a label; their width and height
STUB, BEND = round(LABEL * LETTER) + 14, 84  # of an edge: the level part below its label, and the rest
SHOWN = (2, 3)  # how many of a fact's other columns are listed when they are many: first and last

FACT_COLOUR = "#334155"
COLOURS = ("#0b6bb0", "#a8450a", "#00735a", "#8a3a78", "#77590a", "#5b50b5")  # dark enough on white


@dataclass(slots=True)
class Box:
    """A table and its position. A row: a column, whether in the grain, and whether a dimension key."""

    name: str
    rows: list[tuple[str, bool, bool]]
    colour: str = FACT_COLOUR
    x: float = 0
    y: float = 0
    width: float = 0

    @property
    def height(self) -> float:
        """The height of title and rows."""
        return HEAD + ROW * len(self.rows) + 6


def _boxes(found: Sequence[Edge]) -> tuple[list[Box], list[Box]]:
    """Return facts and dimensions with positions; facts with the most joins first.

    Dimensions are at the height of the facts that use them, alternating left and right: few edges cross.
    """
    marts = [model for model in models() if model.layer == "marts"]
    facts = [_box(model, found) for model in marts if not model.name.startswith("dim_")]
    facts.sort(key=lambda box: (-sum(edge.fact == box.name for edge in found), box.name))
    rank = {box.name: place for place, box in enumerate(facts)}
    dimensions = [_box(model, found) for model in marts if model.name.startswith("dim_")]
    used_at = {d.name: [rank[e.fact] for e in found if e.dimension == d.name] for d in dimensions}
    dimensions.sort(key=lambda box: (mean(used_at[box.name] or [0]), box.name))
    for place, box in enumerate(dimensions):
        box.colour = COLOURS[place % len(COLOURS)]

    x, height = float(EDGE), sum(box.height + GAP for box in facts) - GAP
    for column in (dimensions[::2], facts, dimensions[1::2]):
        spare = height - sum(box.height for box in column)
        space = GAP if column is facts else spare / (len(column) + 1)
        y = float(EDGE) if column is facts else EDGE + space
        width = round(max(len(name) for box in column for name, *_ in box.rows) * NAME) + 40
        for box in column:
            box.x, box.y, box.width = x, y, width
            y += box.height + space
        x += width + STUB + BEND
    return facts, dimensions


def _box(model: Model, found: Sequence[Edge]) -> Box:
    """Yield keys first; of many other columns of a fact only some."""
    foreign = {ours for edge in found if edge.fact == model.name for ours, _ in edge.equal}
    columns = [(c, c in model.grain, c in foreign) for c in column_comments()[model.table]]
    keys = [row for row in columns if row[1] or row[2]]
    other = [row for row in columns if not (row[1] or row[2])]
    first, last = SHOWN
    if not model.name.startswith("dim_") and len(other) > first + last + 1:
        other[first:-last] = [(f"… {len(other) - first - last} more", False, False)]
    return Box(model.name, keys + other)


# --- How it is drawn ------------------------------------------------------------------------------

STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
text { fill: #1e293b } .title { font-weight: 700; fill: #ffffff } .grain { font-weight: 700 }
.other, .key { fill: #64748b } .key { font-size: 9px } .label { font-size: 11px }
.edge { fill: none; stroke-width: 1.4 }
"""


def picture() -> str:
    """Return the star schema as SVG."""
    found = edges()
    facts, dimensions = _boxes(found)
    boxes = [*facts, *dimensions]
    width = max(table.x + table.width for table in boxes) + EDGE
    height = max(table.y + table.height for table in boxes) + EDGE + 32
    size, view = f'width="{width:.0f}" height="{height:.0f}"', f'viewBox="0 0 {width:.0f} {height:.0f}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {view}>',
        "<title>The star schema of marts: facts, dimensions, and the keys that join them</title>",
        "<!-- Made by `make docs`, from the models of sql/marts and sql/checks/keys_resolve.sql. -->",
        f"<style>{STYLE}</style>",
        f'<rect {size} rx="8" fill="#ffffff"/>',
        *_edges(found, facts, dimensions),
        *(line for table in boxes for line in _table(table)),
        *_legend(width / 2, height - EDGE),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _table(box: Box) -> Iterator[str]:
    x, y, right = box.x, box.y, box.x + box.width
    yield (
        f'<rect x="{x}" y="{y:.1f}" width="{box.width}" height="{box.height}" rx="5" '
        f'fill="#f8fafc" stroke="{box.colour}"/>'
    )
    yield (
        f'<path fill="{box.colour}" d="M{x} {y + HEAD:.1f}v{5 - HEAD}q0 -5 5 -5H{right - 5}'
        f'q5 0 5 5v{HEAD - 5}z"/>'
    )
    yield f'<text class="title" x="{x + 10}" y="{y + 17:.1f}">{box.name}</text>'
    for place, (name, in_grain, is_key) in enumerate(box.rows, start=1):
        line = f'y="{y + HEAD + ROW * place - 2:.1f}"'
        kind = "grain" if in_grain else "" if is_key else "other"
        yield f'<text class="{kind}" x="{x + 30}" {line}>{name}</text>'
        if in_grain:
            yield f'<text class="key" x="{x + 9}" {line}>PK</text>'
        if is_key:
            yield f'<text class="key" x="{right - 9}" {line} text-anchor="end">FK</text>'


def _edges(found: Sequence[Edge], facts: Sequence[Box], dimensions: Sequence[Box]) -> Iterator[str]:
    """Give each edge its own start at the fact and its own end at the dimension."""
    box = {one.name: one for one in (*facts, *dimensions)}
    ends: dict[Edge, float] = {}
    for dimension in dimensions:
        here = [
            edge
            for fact in facts
            for edge in found
            if (edge.fact, edge.dimension) == (fact.name, dimension.name)
        ]
        for place, edge in enumerate(here, start=1):
            ends[edge] = dimension.y + dimension.height * place / (len(here) + 1)
    for fact in facts:
        for side in (-1, 1):
            here = [e for e in found if e.fact == fact.name and (box[e.dimension].x - fact.x) * side > 0]
            spare = fact.height - sum(LINE * len(edge.label) for edge in here)
            y = fact.y
            for edge in sorted(here, key=lambda edge: ends[edge]):
                y += spare / (len(here) + 1) + LINE * len(edge.label)
                yield from _edge(edge, side, fact, y, box[edge.dimension], ends[edge])


def _edge(edge: Edge, side: int, fact: Box, y: float, dimension: Box, end: float) -> Iterator[str]:
    """Draw an edge: level below its label, then bent; a crow's foot for many rows, a bar for one."""
    x = fact.x + (fact.width if side > 0 else 0)
    to = dimension.x + (dimension.width if side < 0 else 0)
    stub, bar, anchor = x + side * STUB, to - side * 6, "start" if side > 0 else "end"
    half = (stub + bar) / 2
    style = f'class="edge" stroke="{dimension.colour}"'
    dashes = ' stroke-dasharray="5 4"' if edge.within else ""
    yield (
        f'<path {style}{dashes} d="M{x} {y:.1f}H{stub}'
        f'C{half} {y:.1f} {half} {end:.1f} {bar} {end:.1f}H{to}"/>'
    )
    yield (
        f'<path {style} d="M{x} {y - 4:.1f}L{x + side * 8} {y:.1f}L{x} {y + 4:.1f}'
        f'M{bar} {end - 4:.1f}v8"/>'
    )
    for place, line in enumerate(reversed(edge.label)):
        yield (
            f'<text class="label" x="{x + side * 12}" y="{y - 5 - LINE * place:.1f}" '
            f'text-anchor="{anchor}" style="fill: {dimension.colour}">{escape(line)}</text>'
        )


def _legend(x: float, y: float) -> Iterator[str]:
    reports = ", ".join(f"reports.{report}" for report in RANGES.values())
    words = (
        "PK grain", "FK key of a dimension", "── checked at every build",
        f"╌╌ by range, as {reports} does",
    )  # fmt: skip
    text = " · ".join(words)
    yield f'<text class="other" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
