"""A year of hourly usage of many endpoints and keys: the first load, and one day again.

    python -m benchmarks.usage_year --days 365

600 endpoints, used by three keys in each hour of each day: 43,200 lines a day, in pages of two
hours. The first load is `faletl run` without its build; then one day is fetched again, unchanged.
For comparison, over fewer days, dlt's REST source reads the same pages (benchmarks/peers). The gate
is on, as by default. There is one round, because a year takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

from benchmarks import ours
from benchmarks.account import loaded_total, serving
from benchmarks.extract_load import PACKAGES, PEERS
from benchmarks.measure import Spent, environment_of, figures, print_results, spent
from tests.feed import money

FIRST = date(2025, 11, 1)
ENDPOINTS, KEYS = 600, 3
HOURS_A_PAGE = 2
"""A page has 3,600 lines."""
NANO_PRICE = 25_000_000


def write_usage(folder: Path, days: int) -> tuple[int, str]:
    """Write the answers of `days` days, as `benchmarks.account` serves them; return lines and sum."""
    units = 0
    for number in range(days):
        day = folder / str(FIRST + timedelta(days=number))
        day.mkdir(parents=True)
        for page in range(24 // HOURS_A_PAGE):
            name = f"usage-{page}" if page else "usage"
            (day / f"{name}.json").write_text(_page(number, page))
        units_used = [
            sum(quantity(number, hour, endpoint, key) for hour in range(24) for key in range(KEYS))
            for endpoint in range(ENDPOINTS)
        ]
        summary = ",".join(line(endpoint, None, many) for endpoint, many in enumerate(units_used))
        (day / "summary.json").write_text(
            f'{{"summary":[{summary}],"next_cursor":null,"has_more":false}}'
        )
        units += sum(units_used)
    return days * 24 * ENDPOINTS * KEYS, money(units * NANO_PRICE)


def _page(number: int, page: int) -> str:
    day, last = FIRST + timedelta(days=number), 24 // HOURS_A_PAGE - 1
    buckets = ",".join(
        f'{{"bucket":"{day}T{hour:02d}:00:00Z","results":[{",".join(lines(number, hour))}]}}'
        for hour in range(page * HOURS_A_PAGE, (page + 1) * HOURS_A_PAGE)
    )
    cursor = f'"usage-{page + 1}"' if page < last else "null"
    more = "true" if page < last else "false"
    return f'{{"time_series":[{buckets}],"next_cursor":{cursor},"has_more":{more}}}'


def lines(number: int, hour: int) -> Iterator[str]:
    """Yield the lines of an hour."""
    for endpoint in range(ENDPOINTS):
        for key in range(KEYS):
            yield line(endpoint, key, quantity(number, hour, endpoint, key))


def quantity(number: int, hour: int, endpoint: int, key: int) -> int:
    """Return the units that a key used of an endpoint in an hour."""
    return 1 + (number + hour + endpoint + key) % 7


def line(endpoint: int, key: int | None, many: int) -> str:
    """Return a line as fal writes it; for all keys together if `key` is None."""
    cost = money(many * NANO_PRICE)
    structured = f'{{"detail":"key {key}","api_key_id":"key-{key}"}}'
    who = f',"auth_method":"key {key}","auth_method_structured":{structured}' if key is not None else ""
    return (
        f'{{"endpoint_id":"bench/endpoint-{endpoint:03d}","unit":"images","quantity":{many},'
        f'"unit_price":{money(NANO_PRICE)},"percent_discount":null,"cost_subtotal":{cost},'
        f'"cost_discount":0,"cost_total":{cost},"cost":{cost},"currency":"USD"{who}}}'
    )


def loaded(url: str, folder: Path, days: int, served: tuple[int, str]) -> Iterator[tuple[str, Spent]]:
    """Measure the first load, and then one day of it again."""
    folder.mkdir()
    settings = ours.environment(url, folder)
    for work, many in (("first load", days), ("a day again", 1)):
        yield work, ours.run(FIRST, settings, days=many, builds=False, resources=("usage",))
        assert loaded_total(folder / "warehouse.duckdb", "raw.usage") == served


def loaded_by_dlt(
    python: Path, url: str, folder: Path, days: int, served: tuple[int, str]
) -> Iterator[tuple[str, Spent]]:
    """Measure the first load with dlt."""
    folder.mkdir()
    database = folder / "warehouse.duckdb"
    words = [python, PEERS / "dlt_usage.py", url, database, str(FIRST), str(days)]
    yield "first load", spent(words, {"HOME": str(folder)})
    assert loaded_total(database, "fal.usage") == served


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--peer-days", type=int, default=20)
    parser.add_argument("--python", type=Path, help="Python of an environment with the peers")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        root = Path(name)
        python = arguments.python or environment_of(root / "peers", PACKAGES)
        served = write_usage(root / "few", arguments.peer_days)
        with serving(root / "few") as url:
            few = (url, root / "dlt", arguments.peer_days, served)
            results += [
                ("dlt rest", arguments.peer_days, *spent_once)
                for spent_once in loaded_by_dlt(python, *few)
            ]
            few = (url, root / "faletl", arguments.peer_days, served)
            results += [("faletl", arguments.peer_days, *spent_once) for spent_once in loaded(*few)]
        served = write_usage(root / "year", arguments.days)
        with serving(root / "year") as url:
            year = (url, root / "faletl-year", arguments.days, served)
            results += [("faletl", arguments.days, *spent_once) for spent_once in loaded(*year)]
    print_results(
        {
            "tool": tool,
            "days": days,
            "lines": days * 24 * ENDPOINTS * KEYS,
            "work": work,
            **figures(spent_once),
        }
        for tool, days, work, spent_once in results
    )


if __name__ == "__main__":
    main()
