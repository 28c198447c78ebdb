"""Our sums against fal's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import duckdb

from faletl.duck import count, quoted
from faletl.errors import DataRefusedError, TamperedError, UnprovenError
from faletl.landing.decisions import accept_command
from faletl.landing.extracts import MANIFEST, Part, SealedExtract
from faletl.money import HALF_NANO, plain
from faletl.resources import Proof, Resource
from faletl.staging.digest import rows_digest, rows_source
from faletl.staging.records import MAX_NAMED_ROWS, Typed, of_endpoint, typed_records

log = logging.getLogger(__name__)


def _refused(
    landed: SealedExtract, label: str, typed: Typed, because: str, cure: str = ""
) -> DataRefusedError:
    """The error for a window whose rows cannot all be taken."""
    page = typed.quarantined[0].page
    return DataRefusedError(
        f"{describe_breaches(typed, because)}; the window is not loaded{cure}",
        page=page,
        rows=typed.breaches,
        request_id=landed.manifest.pages(label)[page - 1].request_id,
    )


def describe_breaches(typed: Typed, because: str) -> str:
    shown = typed.quarantined[:MAX_NAMED_ROWS]
    told = "; ".join(
        f"page {one.page} row {one.row}{of_endpoint(one.endpoint_id)}: {ascii(one.reason)[1:-1]}"
        for one in shown
    )
    rows = f"{typed.breaches:,} of fal's rows cannot be right"
    return f"{rows} ({told}{'; …' * (typed.breaches > MAX_NAMED_ROWS)}); {because}"


@dataclass(frozen=True, slots=True)
class UnprovenPart:
    """A part of a window that is not proven.

    `has_lost` says that rows may be lost (or come twice) at an edge of its pages, so that its halves may
    add up; `has_moved`, that rows changed places between pages, or between two walks.
    """

    part: Part
    has_lost: bool
    has_moved: bool


@dataclass(frozen=True, slots=True)
class PartProof:
    """How a part was proven, and fal's total; or, with a sentence, why it is not."""

    proof: str
    total: str | None
    why: str = ""
    unproven: UnprovenPart | None = None


def prove(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    source: str,
    digest: str,
    typed: Typed,
    scratch: Path,
    *,
    is_accepted: bool,
) -> tuple[str, str | None]:
    """Show that the rows are all there; returns how, and fal's total. docs/fal-api.md, "Control totals".

    Fal's own sums do, part by part, and where there are none or those of another ledger, two equal
    walks. Quarantined rows may be missing only where fal's sums say that they are of no value.
    """
    manifest, parts = landed.manifest, landed.manifest.parts
    if resource.proof is None:  # a row that cannot be right decides for itself alone
        return "none", None
    _require_whole(landed)
    verdicts, first = list[PartProof](), 1
    for part in parts:
        last = first + part.pages - 1
        if len(parts) == 1:
            rows = _Rows(source, digest, typed, first, last, is_accepted)
        else:
            own = f"(select * from {source} where _page between {first} and {last})"
            rows = _Rows(own, rows_digest(connection, resource, own), typed, first, last, is_accepted)
        verdicts.append(_prove_part(connection, landed, part, resource, rows, scratch))
        first = last + 1
    total = _sum(verdict.total for verdict in verdicts)
    proofs = {verdict.proof for verdict in verdicts}
    if proofs == {"summary"} and (why := _moved_between(connection, landed, resource, source, scratch)):
        verdicts = [PartProof("differs", total, why, UnprovenPart(part, False, True)) for part in parts]
    unproven = [verdict for verdict in verdicts if verdict.unproven]
    if not unproven:
        return ("two walks" if "two walks" in proofs else "summary"), total
    if is_accepted:
        return "differs", total
    if manifest.window.is_provisional:
        log.warning("%s, window %s: the day is still open and does not add up to fal's control total "
                    "yet (%s)", resource.name, manifest.window, unproven[0].why)  # fmt: skip
        return "differs", total
    error = UnprovenError(
        f"{unproven[0].why}; the next run reads the window again",
        request_id=next((page.request_id for page in manifest.pages("proof")), None),
    )
    error.unproven = [verdict.unproven for verdict in unproven if verdict.unproven]
    raise error


def _moved_between(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    source: str,
    scratch: Path,
) -> str:
    """What shows that rows moved between the parts of a window, of which each adds up; else nothing."""
    whole, proof = landed.manifest.whole, resource.proof
    if whole is None or proof is None:
        return ""
    of_whole = SealedExtract(landed.folder, landed.manifest.of(whole))
    compared = _compared(connection, of_whole, resource, proof, "proof", source, scratch)
    return f"the rows moved meanwhile ({compared.told})" if compared.differs else ""


_NO_TOTAL = (
    "no control total of fal's says that nothing of value is missing without them "
    "(faletl quarantine list shows them)"
)


def _sum(totals: Iterable[str | None]) -> str | None:
    """The exact sum of what fal said; None where it said nothing."""
    told = [Decimal(total) for total in totals if total is not None]
    with localcontext(prec=60):
        return plain(sum(told, Decimal(0))) if told else None


def _require_whole(landed: SealedExtract) -> None:
    """Raises TamperedError where the parts of the window leave some of it out, or overlap."""
    window, parts = landed.manifest.window, landed.manifest.parts
    starts, ends = [part.window.start for part in parts], [part.window.end for part in parts]
    has_rows = all(part.has("rows") for part in parts)
    if not has_rows or [*starts, window.end] != [window.start, *ends]:
        raise TamperedError(
            f"the manifest in {landed.folder} does not cover its window; read the window again with "
            "faletl run --start … --end …",
            file=str(landed.folder / MANIFEST),
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a part: SQL for them, their digest, and the pages that they came on."""

    source: str
    digest: str
    typed: Typed
    first_page: int
    last_page: int
    is_accepted: bool

    @property
    def breaches(self) -> int:
        """How many rows of these pages are quarantined, as far as known, and not accepted."""
        if self.is_accepted:
            return 0
        aside = self.typed.quarantined
        of_others = sum(not self.first_page <= one.page <= self.last_page for one in aside)
        return self.typed.breaches - of_others


def _prove_part(
    connection: duckdb.DuckDBPyConnection,
    whole: SealedExtract,
    part: Part,
    resource: Resource,
    rows: _Rows,
    scratch: Path,
) -> PartProof:
    """Compare the rows of a part with fal's total of it, or with those of its other walk.

    Raises:
        DataRefusedError: rows of the part are quarantined that are of value, as far as fal's sums show.
    """
    landed = SealedExtract(whole.folder, whole.manifest.of(part))
    proof, compared, moved = resource.proof, _Compared(), ""
    assert proof is not None  # noqa: S101  # who asks has looked
    has_total = part.has("proof")
    if has_total:
        compared = _compared(connection, landed, resource, proof, "proof", rows.source, scratch)
        if not compared.differs and part.has("before"):
            moved = _moved(connection, landed, resource, proof, rows.source, scratch)
        if not compared.differs and not moved:
            return PartProof("summary", compared.total)
    has_lost = part.pages > 1 and bool(compared.differs) and (
        compared.is_less or _is_cut_badly(connection, resource, rows.source)
    )  # fmt: skip
    unproven = UnprovenPart(part, has_lost, not compared.differs)
    if rows.breaches and not moved:
        because = _NO_TOTAL if not compared.differs else (
            "fal's control total says that they are of value (faletl quarantine list shows them)"
        )  # fmt: skip
        cure = f"; to load it all the same: {accept_command(whole.manifest)} --reason TEXT"
        error = _refused(whole, "rows", rows.typed, because, cure)
        if has_lost and part.window.halves(resource.smallest_part):
            error.unproven = [unproven]  # what is missing may be lost between pages
        raise error
    can_stand_in = part.has("again") and (proof.two_walks_suffice or not compared.differs)
    is_equal = can_stand_in and (
        _digest_again(connection, landed, resource, rows.typed, scratch) == rows.digest
    )
    if is_equal:
        if compared.differs:
            is_settled = whole.manifest.window.has_settled(whole.manifest.started_at)
            log.log(logging.WARNING if is_settled else logging.INFO,
                    "%s, window %s: two walks agree, but fal's usage says otherwise (%s)",
                    resource.name, part.window, compared.told)  # fmt: skip
        return PartProof("two walks", compared.total)
    if compared.differs:
        why = f"the rows do not add up to fal's control total ({compared.told})"
    else:
        why = f"the rows moved meanwhile ({moved or 'two walks one after the other gave other rows'})"
    return PartProof("differs", compared.total, why, unproven)


def _moved(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    proof: Proof,
    source: str,
    scratch: Path,
) -> str:
    """What shows that rows moved between the pages of a walk, though their sum is right; else nothing.

    One row may have been lost at a page's edge and another, of the same amounts, seen twice. So the
    total was asked for in front of the rows as well, and no row comes on two pages: but for charges
    that are exact twins, and a second walk tells these.
    """
    compared = _compared(connection, landed, resource, proof, "before", source, scratch)
    if compared.differs:
        told = "; ".join(compared.differs[:MAX_NAMED_ROWS])
        return f"fal's control total was another one before they were read: {told}"
    rows = _on_two_pages(connection, resource, source)
    return f"{rows:,} of them came on two pages" if rows else ""


def _on_two_pages(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> int:
    """How many rows come on more than one page, exactly the same."""
    among = f"from {source}"
    if resource.identity:
        key, among = "_hash", f"{among} where _hash in (select _hash {among} where _ordinal > 1)"
    else:
        sums = resource.proof.sums if resource.proof else ()
        key = ", ".join((*resource.key, *sums))
    twice = f"select 1 {among} group by {key} having count(distinct _page) > 1"
    return count(connection, f"select count(*) from ({twice})")


def _is_cut_badly(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> bool:
    """Whether a page ends and the next begins with rows of one instant, or a row is on two pages.

    A cursor that is an instant loses or repeats rows there, the same ones on every walk.
    """
    time = f'"{resource.time}"'
    edges = (
        f"select _page, arg_min({time}, _row) as first_at, arg_max({time}, _row) as last_at "
        f"from {source} group by _page"
    )
    shared = count(
        connection,
        "select count(*) from (select first_at, lag(last_at) over (order by _page) as before_at "
        f"from ({edges})) where first_at = before_at",
    )
    return bool(shared or _on_two_pages(connection, resource, source))


@dataclass(frozen=True, slots=True)
class _Compared:
    """Where our sums are not fal's, as sentences; whether one is less; and fal's sum of all costs."""

    differs: Sequence[str] = ()
    is_less: bool = False
    total: str | None = None

    @property
    def told(self) -> str:
        """The first of the differences, and how many there are."""
        return f"{len(self.differs)} lines differ: {'; '.join(self.differs[:MAX_NAMED_ROWS])}"


def _compared(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    proof: Proof,
    label: str,
    source: str,
    scratch: Path,
) -> _Compared:
    """Compare the sums of the rows with those of the total of that label."""
    totals = scratch / f"{landed.manifest.load_id}.{label}.parquet"
    typed = typed_records(connection, landed, resource, label, totals)
    if typed.breaches:
        raise _refused(landed, label, typed, "they are of fal's control total")
    total = connection.execute(
        f"select coalesce(sum(cost_total), 0)::varchar from {quoted(totals)} where {proof.only}"
    ).fetchone()
    differs = _differences(connection, proof, source, totals)
    is_less = bool(differs) and _is_less(connection, proof, source, totals)
    totals.unlink()
    return _Compared(differs, is_less, str(total[0]) if total else "0")


def _is_less(connection: duckdb.DuckDBPyConnection, proof: Proof, source: str, totals: Path) -> bool:
    """Whether we hold less of something than fal says, by more than what fal may have rounded."""
    less = " or ".join(
        f"coalesce(fals.{name}, 0) - coalesce(ours.{name}, 0) > {_tolerance(name)}"
        for name in proof.sums
    )
    return (
        count(connection, f"select count(*) from {_both_sums(proof, source, totals)} where {less}") > 0
    )


def _digest_again(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    typed: Typed,
    scratch: Path,
) -> str:
    """The digest of the rows of the other walk; of this one `typed` is what became of them."""
    again = scratch / f"{landed.manifest.load_id}.again.parquet"
    found = typed_records(connection, landed, resource, "again", again)
    if found.breaches > typed.breaches:
        raise _refused(landed, "again", found, "the other walk had no such rows")
    source, files = rows_source(connection, resource, again)
    digest = rows_digest(connection, resource, source)
    for file in files:
        file.unlink()
    return digest


def _differences(
    connection: duckdb.DuckDBPyConnection, proof: Proof, source: str, totals: Path
) -> list[str]:
    """Where our sums per key are not fal's, as sentences.

    A sum may differ by half a nano for each amount added up, ours and fal's, as fal rounds each to a
    nano-dollar. A quantity may also differ by one part in 10^12, as fal may have summed it in doubles.
    """
    off = " or ".join(
        f"abs(coalesce(ours.{name}, 0) - coalesce(fals.{name}, 0)) > {_tolerance(name)}"
        for name in proof.sums
    )
    figures = ", ".join(f"coalesce(ours.{name}, 0), coalesce(fals.{name}, 0)" for name in proof.sums)
    whose = ", ".join(f"coalesce(ours.{name}, fals.{name})" for name in proof.key)
    both = _both_sums(proof, source, totals)
    found = connection.execute(
        f"select {whose}, {figures} from {both} where {off} order by all"
    ).fetchall()
    return [_difference(proof, row[: len(proof.key)], row[len(proof.key) :]) for row in found]


def _both_sums(proof: Proof, source: str, totals: Path) -> str:
    """SQL for the sums per key, `ours` and `fals`, next to each other; with `n` amounts in each."""
    none = {column.name for column in proof.columns if column.zero_is_none}
    keys = ", ".join(f"nullif({name}, 0) as {name}" if name in none else name for name in proof.key)
    sums = ", ".join(f"sum({name}) as {name}" for name in proof.sums)
    numbers = ", ".join(str(number) for number in range(1, len(proof.key) + 1))
    same = " and ".join(f"ours.{name} is not distinct from fals.{name}" for name in proof.key)
    lines = f"select {keys}, count(*) as n, {sums} from"
    return (
        f"({lines} {source} group by {numbers}) as ours "
        f"full join ({lines} {quoted(totals)} where {proof.only} group by {numbers}) as fals on {same}"
    )


def _difference(proof: Proof, key: tuple[Any, ...], figures: tuple[Decimal, ...]) -> str:
    """One line that differs, as a sentence: which it is, what we hold, what fal says."""
    which = ", ".join(
        f"{name} {plain(value) if isinstance(value, Decimal) else ascii(value)}"
        for name, value in zip(proof.key, key, strict=True)
        if value is not None
    )
    ours, fals = figures[::2], figures[1::2]
    sums = ", ".join(
        f"{name} {plain(held)} held, {plain(said)} by fal"
        for name, held, said in zip(proof.sums, ours, fals, strict=True)
        if held != said
    )
    return f"{which}: {sums}"


def _tolerance(name: str) -> str:
    """SQL for what our sum of the amounts may differ from fal's."""
    each = HALF_NANO
    if name == "quantity":
        in_doubles = "cast(coalesce(fals.quantity, 0) as decimal(26,0)) * 0.000000000001"
        each = f"greatest({HALF_NANO}, {in_doubles})"
    return f"(coalesce(ours.n, 0) + coalesce(fals.n, 0)) * {each}"
