"""The proof of a window: our sums compared with fal's control totals."""

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
    """Return the error for a window with rows that violate fal's contract."""
    page = typed.quarantined[0].page
    return DataRefusedError(
        f"{describe_breaches(typed, because)}; the window is not loaded{cure}",
        page=page,
        rows=typed.breaches,
        request_id=landed.manifest.pages(label)[page - 1].request_id,
    )


def describe_breaches(typed: Typed, because: str) -> str:
    """Return a sentence with the number of rows that violate fal's contract, and the first of them."""
    reasons = "; ".join(
        f"page {row.page} row {row.row}{of_endpoint(row.endpoint_id)}: {ascii(row.reason)[1:-1]}"
        for row in typed.quarantined[:MAX_NAMED_ROWS]
    )
    rows = "1 row violates" if typed.breaches == 1 else f"{typed.breaches:,} rows violate"
    return f"{rows} fal's contract ({reasons}{'; …' * (typed.breaches > MAX_NAMED_ROWS)}); {because}"


@dataclass(frozen=True, slots=True)
class UnprovenPart:
    """A part of a window that is not proven.

    `has_lost`: rows may be lost (or come twice) at an edge of its pages, so its halves may add up.
    `has_moved`: rows moved between pages, or between two walks.
    """

    part: Part
    has_lost: bool
    has_moved: bool


@dataclass(frozen=True, slots=True)
class PartProof:
    """The proof of a part and fal's total; or the reason why the part is not proven, as a sentence."""

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
    """Prove that the rows are complete; return the kind of proof, and fal's total.

    Each part is compared with fal's own sums. Where there are none, or those of another ledger, two
    equal walks prove it (docs/fal-api.md, "Control totals"). Quarantined rows may be missing only where
    fal's sums show that they have no value.
    """
    manifest, parts = landed.manifest, landed.manifest.parts
    if resource.proof is None:  # a quarantined row concerns no other row
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
    if proofs == {"summary"} and (
        why := _moved_between_parts(connection, landed, resource, source, scratch)
    ):
        verdicts = [PartProof("differs", total, why, UnprovenPart(part, False, True)) for part in parts]
    unproven = [verdict for verdict in verdicts if verdict.unproven]
    if not unproven:
        return ("two walks" if "two walks" in proofs else "summary"), total
    if is_accepted:
        return "differs", total
    if manifest.window.is_provisional:
        log.warning("%s, window %s: the day is still open, and its rows do not yet add up to fal's "
                    "control total (%s)", resource.name, manifest.window, unproven[0].why)  # fmt: skip
        return "differs", total
    error = UnprovenError(
        f"{unproven[0].why}; the next run fetches the window again",
        request_id=next((page.request_id for page in manifest.pages("proof")), None),
    )
    error.unproven = [verdict.unproven for verdict in unproven if verdict.unproven]
    raise error


def _moved_between_parts(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    source: str,
    scratch: Path,
) -> str:
    """Return the evidence that rows moved between parts of a window that each add up; else empty."""
    whole, proof = landed.manifest.whole, resource.proof
    if whole is None or proof is None:
        return ""
    of_whole = SealedExtract(landed.folder, landed.manifest.of(whole))
    comparison = _compare_totals(connection, of_whole, resource, proof, "proof", source, scratch)
    return f"{_ROWS_MOVED} ({comparison.summary})" if comparison.differences else ""


_ROWS_MOVED = "rows moved between pages while the window was fetched"

_NO_TOTAL = (
    "fal gave no control total that shows that they have no value (faletl quarantine list shows them)"
)


def _sum(totals: Iterable[str | None]) -> str | None:
    """Return the exact sum of fal's totals; None where fal gave none."""
    known = [Decimal(total) for total in totals if total is not None]
    with localcontext(prec=60):
        return plain(sum(known, Decimal(0))) if known else None


def _require_whole(landed: SealedExtract) -> None:
    """Raise TamperedError where the parts of the window leave some of it out, or overlap."""
    window, parts = landed.manifest.window, landed.manifest.parts
    starts, ends = [part.window.start for part in parts], [part.window.end for part in parts]
    has_rows = all(part.has("rows") for part in parts)
    if not has_rows or [*starts, window.end] != [window.start, *ends]:
        raise TamperedError(
            f"the manifest in {landed.folder} does not cover its window; fetch the window again with "
            "faletl run --start … --end …",
            file=str(landed.folder / MANIFEST),
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a part: SQL for them, their digest, and the pages that they came from."""

    source: str
    digest: str
    typed: Typed
    first_page: int
    last_page: int
    is_accepted: bool

    @property
    def breaches(self) -> int:
        """The number of rows of these pages that are quarantined, as far as known, and not accepted."""
        if self.is_accepted:
            return 0
        rows = self.typed.quarantined
        of_others = sum(not self.first_page <= row.page <= self.last_page for row in rows)
        return self.typed.breaches - of_others


def _prove_part(
    connection: duckdb.DuckDBPyConnection,
    whole: SealedExtract,
    part: Part,
    resource: Resource,
    rows: _Rows,
    scratch: Path,
) -> PartProof:
    """Compare the rows of a part with fal's total of it, or with the rows of its other walk.

    Raises:
        DataRefusedError: rows of the part are quarantined, and fal's sums do not show that they have no
            value.
    """
    landed = SealedExtract(whole.folder, whole.manifest.of(part))
    proof, comparison, moved = resource.proof, _Comparison(), ""
    assert proof is not None  # noqa: S101  # the caller has checked it
    has_total = part.has("proof")
    if has_total:
        comparison = _compare_totals(connection, landed, resource, proof, "proof", rows.source, scratch)
        if not comparison.differences and part.has("before"):
            moved = _rows_moved(connection, landed, resource, proof, rows.source, scratch)
        if not comparison.differences and not moved:
            return PartProof("summary", comparison.total)
    has_lost = part.pages > 1 and bool(comparison.differences) and (
        comparison.is_less or _is_cut_badly(connection, resource, rows.source)
    )  # fmt: skip
    unproven = UnprovenPart(part, has_lost, not comparison.differences)
    if rows.breaches and not moved:
        because = _NO_TOTAL if not comparison.differences else (
            "fal's control total shows that they have a value (faletl quarantine list shows them)"
        )  # fmt: skip
        cure = f"; to load it all the same: {accept_command(whole.manifest)} --reason TEXT"
        error = _refused(whole, "rows", rows.typed, because, cure)
        if has_lost and part.window.halves(resource.smallest_part):
            error.unproven = [unproven]  # the missing rows may be lost between pages
        raise error
    can_replace_total = part.has("again") and (proof.two_walks_suffice or not comparison.differences)
    is_equal = can_replace_total and (
        _digest_again(connection, landed, resource, rows.typed, scratch) == rows.digest
    )
    if is_equal:
        if comparison.differences:
            is_settled = whole.manifest.window.has_settled(whole.manifest.started_at)
            log.log(logging.WARNING if is_settled else logging.INFO,
                    "%s, window %s: two walks agree with each other, but not with fal's usage (%s)",
                    resource.name, part.window, comparison.summary)  # fmt: skip
        return PartProof("two walks", comparison.total)
    if comparison.differences:
        why = f"the rows do not add up to fal's control total ({comparison.summary})"
    else:
        why = f"{_ROWS_MOVED} ({moved or 'a second walk gave other rows'})"
    return PartProof("differs", comparison.total, why, unproven)


def _rows_moved(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    proof: Proof,
    source: str,
    scratch: Path,
) -> str:
    """Return the evidence that rows moved between the pages of a walk whose sum is right; else empty.

    A row may be lost at the edge of a page while another, with the same amounts, comes twice. So the
    total was asked for before the rows as well, and no row may come on two pages. Charges that are
    exact twins may; a second walk decides about them.
    """
    comparison = _compare_totals(connection, landed, resource, proof, "before", source, scratch)
    if comparison.differences:
        lines = "; ".join(comparison.differences[:MAX_NAMED_ROWS])
        return f"fal's control total was different before they were fetched: {lines}"
    rows = _on_two_pages(connection, resource, source)
    return f"{rows:,} of them came on two pages" if rows else ""


def _on_two_pages(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> int:
    """Return the number of rows that come, exactly equal, on more than one page."""
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

    A cursor that is an instant loses or repeats rows there, the same rows on every walk.
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
class _Comparison:
    """Our sums against fal's: the differences as sentences, whether one of ours is less, fal's total."""

    differences: Sequence[str] = ()
    is_less: bool = False
    total: str | None = None

    @property
    def summary(self) -> str:
        """The number of differences, and the first of them."""
        lines = "; ".join(self.differences[:MAX_NAMED_ROWS])
        return f"{len(self.differences)} lines differ: {lines}"


def _compare_totals(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    proof: Proof,
    label: str,
    source: str,
    scratch: Path,
) -> _Comparison:
    """Compare the sums of the rows with those of the total that has this label."""
    totals = scratch / f"{landed.manifest.load_id}.{label}.parquet"
    typed = typed_records(connection, landed, resource, label, totals)
    if typed.breaches:
        raise _refused(landed, label, typed, "they belong to fal's control total")
    total = connection.execute(
        f"select coalesce(sum(cost_total), 0)::varchar from {quoted(totals)} where {proof.only}"
    ).fetchone()
    differences = _differences(connection, proof, source, totals)
    is_less = bool(differences) and _is_less(connection, proof, source, totals)
    totals.unlink()
    return _Comparison(differences, is_less, str(total[0]) if total else "0")


def _is_less(connection: duckdb.DuckDBPyConnection, proof: Proof, source: str, totals: Path) -> bool:
    """Whether one of our sums is less than fal's, by more than fal may have rounded."""
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
    """Return the digest of the rows of the other walk; `typed` describes the rows of the first."""
    again = scratch / f"{landed.manifest.load_id}.again.parquet"
    other = typed_records(connection, landed, resource, "again", again)
    if other.breaches > typed.breaches:
        raise _refused(landed, "again", other, "the first walk had no such rows")
    source, files = rows_source(connection, resource, again)
    digest = rows_digest(connection, resource, source)
    for file in files:
        file.unlink()
    return digest


def _differences(
    connection: duckdb.DuckDBPyConnection, proof: Proof, source: str, totals: Path
) -> list[str]:
    """Return the differences of our sums per key from fal's, as sentences.

    A sum may differ by half a nano-dollar for each amount in it, ours and fal's, because fal rounds each
    amount to a nano-dollar. A quantity may also differ by one part in 10^12, because fal may have
    summed it in doubles.
    """
    is_different = " or ".join(
        f"abs(coalesce(ours.{name}, 0) - coalesce(fals.{name}, 0)) > {_tolerance(name)}"
        for name in proof.sums
    )
    figures = ", ".join(f"coalesce(ours.{name}, 0), coalesce(fals.{name}, 0)" for name in proof.sums)
    key = ", ".join(f"coalesce(ours.{name}, fals.{name})" for name in proof.key)
    both = _both_sums(proof, source, totals)
    rows = connection.execute(
        f"select {key}, {figures} from {both} where {is_different} order by all"
    ).fetchall()
    return [_difference(proof, row[: len(proof.key)], row[len(proof.key) :]) for row in rows]


def _both_sums(proof: Proof, source: str, totals: Path) -> str:
    """Return SQL for the sums per key, `ours` next to `fals`, each with `n`, the number of amounts."""
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
    """Return a sentence for one line that differs: its key, our sums and fal's."""
    line = ", ".join(
        f"{name} {plain(value) if isinstance(value, Decimal) else ascii(value)}"
        for name, value in zip(proof.key, key, strict=True)
        if value is not None
    )
    ours, fals = figures[::2], figures[1::2]
    sums = ", ".join(
        f"{name} {plain(our_sum)} fetched, {plain(fal_sum)} by fal's total"
        for name, our_sum, fal_sum in zip(proof.sums, ours, fals, strict=True)
        if our_sum != fal_sum
    )
    return f"{line}: {sums}"


def _tolerance(name: str) -> str:
    """Return SQL for the largest difference of our sum from fal's that is rounding."""
    each = HALF_NANO
    if name == "quantity":
        in_doubles = "cast(coalesce(fals.quantity, 0) as decimal(26,0)) * 0.000000000001"
        each = f"greatest({HALF_NANO}, {in_doubles})"
    return f"(coalesce(ours.n, 0) + coalesce(fals.n, 0)) * {each}"
