"""Laws that a warehouse must keep after whatever happened, checked by other code than faletl's.

They read tables, manifests and pages as they lie there; what was served is nobody's business here.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections import Counter
from collections.abc import Collection
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard

from faletl.config import Settings
from tests.conftest import ask, opened
from tests.truth import rounded

RECORDS = {"usage": ("time_series", "results"), "billing_events": ("billing_events",)}
LAYERS = (
    "raw.usage", "marts.fct_usage", "reports.rpt_spend_daily", "reports.rpt_spend_monthly",
    "reports.rpt_spend_by_credential",
)  # fmt: skip


def check_laws(settings: Settings, days: Collection[str] | None = None) -> None:
    """All of them; lineage row by row of these days only, if any are given."""
    check_ledger(settings)
    check_money(settings)
    check_lineage(settings, days)
    check_modes(Path(settings.landing))


def check_ledger(settings: Settings) -> None:
    """Each window has one current load; its rows and sums are those in raw; tokens grow."""
    loads = ask(
        settings,
        "select account, resource, cast(window_start as date), load_id, fencing_token, rows, "
        "cost_total, is_current, digest, last_fencing_token from ops.loads where resource <> 'credits' "
        "order by account, resource, window_start, fencing_token",
        through=opened,
    )
    windows: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for load in loads:
        windows.setdefault(load[:3], []).append(load)
    for window, versions in windows.items():
        if window[1] in RECORDS:
            assert [v[7] for v in versions] == [False] * (len(versions) - 1) + [True], window
        for before, after in pairwise(versions):
            assert before[4] < after[4], window
            assert before[9] <= after[9], window
            assert before[8] != after[8] or window[1] not in RECORDS, f"{window}: a version without news"
    for resource in RECORDS:
        held = ask(
            settings,
            f"select _load_id, count(*), coalesce(sum(cost_total), 0) from raw.{resource} "
            "group by _load_id",
            through=opened,
        )
        told = {load[3]: load[5:7] for load in loads if load[1] == resource and load[7] and load[5]}
        assert {load_id: (rows, cost) for load_id, rows, cost in held} == told, resource


def check_money(settings: Settings) -> None:
    """One sum in every layer; no column that could round."""
    sums = {
        tuple(
            ask(
                settings, f"select currency, sum(cost_total) from {layer} group by currency order by all"
            )
        )
        for layer in LAYERS[1:]
    }
    assert len(sums) <= 1, sums
    floats = ask(
        settings,
        "select table_name, column_name from information_schema.columns "
        "where table_schema in ('raw', 'staging', 'marts', 'reports', 'ops') "
        "and lower(data_type) in ('double', 'float', 'real', 'double precision')",
    )
    assert floats == []


def check_lineage(settings: Settings, days: Collection[str] | None = None) -> None:
    """Every row in raw is that row of that page of that read, which lies there as it was sealed."""
    root = Path(settings.landing)
    current = ask(
        settings,
        "select load_id, resource, cast(window_start as date), landing_path from ops.loads "
        "where is_current and resource in ('usage', 'billing_events')",
        through=opened,
    )
    for load_id, resource, day, path in current:
        if days is not None and str(day) not in days:
            continue
        landed = _landed_costs(root / path, RECORDS[resource])
        held = ask(
            settings,
            f"select _page, _row, endpoint_id, cost_total from raw.{resource} "
            f"where _load_id = '{load_id}'",
            through=opened,
        )
        assert len(held) == len({row[:2] for row in held}), f"{resource} {day}: a row twice"
        for page, row, endpoint_id, cost in held:
            assert landed[page, row] == (endpoint_id, cost), f"{resource} {day} page {page} row {row}"


def _landed_costs(folder: Path, records: tuple[str, ...]) -> dict[tuple[int, int], tuple[str, Decimal]]:
    """Endpoint and cost of each record of the extract, by page and row, to the 12th decimal."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    pages = [page for call in manifest["calls"] if call["label"] == "rows" for page in call["pages"]]
    found = {}
    for number, page in enumerate(pages, 1):
        content = (folder / page["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == page["sha256"], folder / page["file"]
        body = json.loads(zstandard.decompress(content), parse_float=Decimal, parse_int=Decimal)
        rows = [body]
        for step in records:
            rows = [inner for one in rows for inner in one[step]]
        assert len(rows) == page["rows"], folder / page["file"]
        for row, one in enumerate(rows, 1):
            found[number, row] = (one["endpoint_id"], rounded(one["cost_total"]))
    return found


def check_modes(landing: Path) -> None:
    """Only the owner can read what landed."""
    modes = Counter(
        (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [landing, *landing.rglob("*")]
    )
    assert set(modes) <= {(True, 0o700), (False, 0o600)}, modes
