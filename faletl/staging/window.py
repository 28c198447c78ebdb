"""Staging: landed pages → typed, proven rows of one window, set-wise in DuckDB.

Records go to DuckDB unchanged, one on each line, and every number is cast from its text to DECIMAL.
DuckDB reads a JSON number through a double, which keeps 15 digits for certain. So a longer number
becomes a JSON text with the exact amount (faletl/money.py); where a record is refused that way, every
number does. The result is a Parquet file of all records, written once, and a query over it for the rows
of the window, with the columns of the raw table, which any warehouse can load.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from faletl import duck
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import DataRefusedError, ExhaustedError, FaletlError, StorageError
from faletl.fal.bodies import one_body
from faletl.files import free_space
from faletl.findings import Drift, Findings, acceptance_key
from faletl.landing.extracts import SealedExtract
from faletl.resources import RESOURCES, WHOLE_SINCE, Resource
from faletl.staging.contract import TOO_LARGE, Contract
from faletl.staging.digest import digest_of, digest_sums, rows_source
from faletl.staging.proof import describe_breaches, prove
from faletl.staging.records import Typed, typed_records
from faletl.windows import Window

log = logging.getLogger(__name__)


_SMALL_INPUT_BYTES = 2**20  # of compressed pages


@dataclass(frozen=True, slots=True)
class Staged:
    """Typed rows of one window, ready to be loaded.

    `source` is DuckDB SQL for these rows, to follow `from`: a query over Parquet `files`, with the
    columns of the raw table. `digest` depends on the rows alone, not on their order, their pages or the
    load. `proof` names the kind of proof: `summary`, `two walks`, `none` (without a control total) or
    `differs` (a day still open, or one that a person accepted: `is_accepted`). `control_total` is fal's
    own sum of the window's cost, where fal gave one. `asked_ids` are the endpoints that were asked for;
    None where the rows are of all endpoints.
    """

    source: str
    files: tuple[Path, ...]
    landed: SealedExtract
    resource: Resource
    rows: int
    digest: str
    proof: str
    control_total: str | None
    landed_rows: int
    dropped_rows: int
    repeated_rows: int
    doubtful_rows: int
    rounded_amounts: int
    cost_total: str
    is_accepted: bool
    findings: Findings
    endpoint_ids: frozenset[str]
    asked_ids: frozenset[str] | None

    def discard(self) -> None:
        """Delete the files; the rows are loaded, or never will be."""
        for file in self.files:
            file.unlink(missing_ok=True)


def stage_window(
    settings: Settings, landed: SealedExtract, scratch: Path, accepted: Container[str] = ()
) -> Staged:
    """Type, check and prove the rows of an extract; Parquet files go to `scratch`.

    `accepted` are keys of windows with rows that a person accepted though they violate the contract:
    then negative amounts are kept, and the window is loaded without rows that cannot be typed.

    Raises:
        TamperedError: a landed page has changed since it landed.
        ContractError, DataRefusedError: a record violates the catalogue.
        UnprovenError: the rows do not add up to fal's control total, and the window is closed.
    """
    manifest = landed.manifest
    resource = RESOURCES[manifest.resource]
    try:
        # A window with a large page keeps its turn to the end: the engine also has much of it in memory.
        with one_body(), _engine(settings, scratch, landed) as connection:
            return _stage(connection, landed, resource, scratch, accepted)
    except FaletlError as error:
        raise error.at(resource=resource.name, window=str(manifest.window)) from None
    except duckdb.InvalidInputException as error:
        is_huge = "maximum_object_size" in str(error)
        reason = str(error).splitlines()[0]
        sentence = f"fal's records cannot be read: {reason}; the window is not loaded"
        raise DataRefusedError(
            TOO_LARGE if is_huge else sentence, resource=resource.name, window=str(manifest.window)
        ) from None
    except duckdb.OutOfMemoryException as error:
        raise ExhaustedError.of_engine(
            "staging", error, resource=resource.name, window=str(manifest.window)
        ) from None
    except (OSError, duckdb.IOException) as error:
        raise StorageError(
            f"staging failed: {str(error).splitlines()[0]} ({free_space(scratch)}); make room below "
            f"{scratch.parent}, or set TMPDIR", resource=resource.name, window=str(manifest.window),
        ) from None  # fmt: skip


def _stage(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    scratch: Path,
    accepted: Container[str],
) -> Staged:
    manifest = landed.manifest
    path = scratch / f"{manifest.load_id}.parquet"
    typed = typed_records(connection, landed, resource, "rows", path)
    key = acceptance_key(manifest.account, _findings(landed, typed).rows_digest)
    is_accepted = typed.breaches > 0 and key in accepted
    applied = resource.with_any_sign if is_accepted else resource
    if is_accepted:
        typed = typed_records(connection, landed, applied, "rows", path)
    findings = _findings(landed, typed)
    valid, inside = connection.execute(
        f"select count(*), count(*) filter (where _is_inside) from {quoted(path)} where _breach = ''"
    ).fetchone() or (0, 0)
    dropped = valid - inside
    if dropped:
        log.warning("%s, window %s: %s", resource.name, manifest.window, _why_dropped(resource, dropped))
    if typed.unusable:
        log.warning("%s, window %s: %s", resource.name, manifest.window, _why_empty(typed))
    source, files = rows_source(connection, resource, path)
    figures = connection.execute(
        f"select {digest_sums(resource)}, {_doubtful_rows(resource)}, {_cost_total(resource)}, "
        f"{_endpoint_ids(resource)} from {source}"
    ).fetchone()
    rows, hashes, doubtful, total, endpoint_ids = figures or (0, None, 0, "0", None)
    digest = digest_of((rows, hashes))
    try:
        proof, control_total = prove(
            connection, landed, applied, source, digest, typed, scratch, is_accepted=is_accepted
        )
    except FaletlError as error:
        error.findings = findings
        raise
    if typed.breaches:
        why = "" if resource.proof is None else (
            "fal's control total shows that they have no value, so "
        )  # fmt: skip
        because = f"{why}they are quarantined and the others are loaded (see faletl quarantine list)"
        log.warning(
            "%s, window %s: %s", resource.name, manifest.window, describe_breaches(typed, because)
        )
    return Staged(
        source=source,
        files=files,
        landed=landed,
        resource=resource,
        rows=rows,
        digest=digest,
        proof=proof,
        control_total=control_total,
        landed_rows=sum(page.rows for page in manifest.pages("rows")),
        dropped_rows=dropped,
        repeated_rows=inside - rows,
        doubtful_rows=doubtful,
        rounded_amounts=typed.rounded,
        cost_total=total,
        is_accepted=is_accepted,
        findings=findings,
        endpoint_ids=frozenset(endpoint_ids or ()),
        asked_ids=manifest.asked_ids if resource.ids_per_call else None,
    )


def _findings(landed: SealedExtract, typed: Typed) -> Findings:
    """Return the findings in the rows."""
    drifts = tuple(_drifts(typed.contract, landed.manifest.window))
    return Findings(landed.ref, typed.breaches, typed.quarantined, drifts)


def _why_dropped(resource: Resource, rows: int) -> str:
    """Return a sentence that says why valid rows are not in the window."""
    if resource.nothing_without:
        return f"fal sent no {resource.nothing_without}, so there is nothing to load"
    return f"fal sent {rows} rows outside the window; they are not loaded"


def _why_empty(typed: Typed) -> str:
    """Return a sentence with the values that stay empty although fal sent something."""
    values = "; ".join(typed.unusable_values) + "; …" * (typed.unusable > len(typed.unusable_values))
    return f"{typed.unusable:,} of fal's rows have values that cannot be used and stay empty ({values})"


def _drifts(contract: Contract, window: Window) -> Iterator[Drift]:
    """Yield the changes of fal's records that the pages show.

    Days before `WHOLE_SINCE` may lack fields that fal added later.
    """
    for steps, sample in contract.new.items():
        yield Drift(".".join(steps), "new", sample)
    for steps, sample in contract.retyped.items():
        yield Drift(".".join(steps), "retyped", sample)
    for steps in contract.missing if window.day >= WHOLE_SINCE else ():
        yield Drift(".".join(steps), "missing", None)


def _doubtful_rows(resource: Resource) -> str:
    """Return SQL for the number of rows that are kept as fal sent them but fail an expectation."""
    odd = " or ".join(f"({predicate})" for predicate in resource.expected.values()) or "false"
    return f"count(*) filter (where {odd})"


def _cost_total(resource: Resource) -> str:
    """Return SQL for the cost of all rows as a text, "0" where they have none."""
    has_cost = any(column.name == "cost_total" for column in resource.columns)
    return f"cast(coalesce({'sum(cost_total)' if has_cost else 'null'}, 0) as varchar)"


def _engine(
    settings: Settings, scratch: Path, landed: SealedExtract
) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    size = sum(page.bytes for call in landed.manifest.calls for page in call.pages)
    # More threads only slow down a small input; windows run in parallel anyway.
    threads = {"threads": "1"} if size < _SMALL_INPUT_BYTES else {}
    # Threads need not wait for each other if rows have no order.
    return duck.engine(settings.memory, scratch, preserve_insertion_order="false", **threads)


def _endpoint_ids(resource: Resource) -> str:
    """Return SQL for the list of the rows' endpoints; null where rows have no endpoint."""
    return "list(distinct endpoint_id)" if resource.has_endpoints else "null"
