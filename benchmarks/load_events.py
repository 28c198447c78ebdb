"""What loading a day of billing events costs: CPU, wall and peak memory, for growing numbers of events.

    python benchmarks/load_events.py 1000000 5000000

Serves a day of events in pages of 10,000 over loopback, in a process of its own, and runs the whole
`faletl run` over it: landed compressed, proven against usage, built, checked, published. The sum in the
published copy must be the one served. Prints one JSON line per size, then a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import duckdb

PAGE = 10_000
DAY = datetime(2026, 11, 1, tzinfo=UTC)
ENDPOINTS = 50
NANO_PRICE = 25_000_000  # of one unit


def event(number: int, of: int) -> tuple[datetime, str, int]:
    """Instant, endpoint and whole quantity of an event; spread over the day in order."""
    at = DAY + timedelta(microseconds=number * 86_400_000_000 // of)
    return at, f"bench/endpoint-{number % ENDPOINTS:02d}", 1 + number % 7


def money(nano: int) -> str:
    """Nano-dollars as a JSON number in dollars."""
    return f"{nano // 10**9}.{nano % 10**9:09d}"


def page(first: int, of: int) -> bytes:
    """A page of events as fal writes it."""
    rows = []
    for number in range(first, min(first + PAGE, of)):
        at, endpoint, quantity = event(number, of)
        cost = money(quantity * NANO_PRICE)
        rows.append(
            f'{{"request_id":"req-{number:09d}-6f1c-4a27-9f0e","endpoint_id":"{endpoint}",'
            f'"timestamp":"{at:%Y-%m-%dT%H:%M:%S.%f}Z","quantity":{quantity},"output_units":{quantity},'
            f'"unit":"images","unit_price":0.025,"percent_discount":null,"cost_subtotal":{cost},'
            f'"cost_discount":0,"cost_total":{cost},"cost_estimate_nano_usd":{quantity * NANO_PRICE},'
            f'"auth_method":"prod","auth_method_structured":{{"detail":"prod","api_key_id":"key-1"}}}}'
        )
    following = first + PAGE if first + PAGE < of else None
    cursor = json.dumps(None if following is None else str(following))
    more = json.dumps(following is not None)
    return f'{{"billing_events":[{",".join(rows)}],"next_cursor":{cursor},"has_more":{more}}}'.encode()


def usage(of: int) -> bytes:
    """The same charges, added up: by hour for the series, by endpoint for the summary."""
    hours: Counter[tuple[int, str]] = Counter()
    for number in range(of):
        at, endpoint, quantity = event(number, of)
        hours[at.hour, endpoint] += quantity
    endpoints: Counter[str] = Counter()
    for (_, endpoint), quantity in hours.items():
        endpoints[endpoint] += quantity

    def row(endpoint: str, quantity: int) -> str:
        cost = money(quantity * NANO_PRICE)
        return (
            f'{{"endpoint_id":"{endpoint}","unit":"images","quantity":{quantity},"unit_price":0.025,'
            f'"percent_discount":null,"cost_subtotal":{cost},"cost_discount":0,"cost_total":{cost},'
            f'"cost":{cost},"currency":"USD","auth_method":"prod",'
            '"auth_method_structured":{"detail":"prod","api_key_id":"key-1"}}'
        )

    series = ",".join(
        f'{{"bucket":"{DAY + timedelta(hours=hour):%Y-%m-%dT%H:%M:%SZ}","results":['
        + ",".join(row(e, quantity) for (h, e), quantity in hours.items() if h == hour)
        + "]}"
        for hour in range(24)
    )
    summary = ",".join(row(endpoint, quantity) for endpoint, quantity in endpoints.items())
    return (
        f'{{"time_series":[{series}],"summary":[{summary}],"next_cursor":null,"has_more":false}}'
    ).encode()


def serve(folder: Path, ready: Any) -> None:
    """Serve the bodies that lie in the folder, until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            name = "usage.json"
            if url.path.endswith("billing-events"):
                name = f"{query.get('cursor', ['0'])[0]}.json"
            body = (folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.put(server.server_address[1])
    server.serve_forever()


def measured(events: int, memory: str) -> dict[str, Any]:
    """Serve and load that many events in a fresh folder; returns the figures of the run."""
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        folder = Path(name)
        for first in range(0, events, PAGE):
            (folder / f"{first}.json").write_bytes(page(first, events))
        (folder / "usage.json").write_bytes(usage(events))
        ready: Any = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve, args=(folder, ready), daemon=True)
        server.start()
        try:
            return {"events": events, "memory": memory, **run(folder, ready.get(), memory, events)}
        finally:
            server.terminate()
            server.join()


def run(folder: Path, port: int, memory: str, events: int) -> dict[str, Any]:
    """One `faletl run` over the day, with its CPU, wall and peak memory, its sum checked."""
    environment = {
        "PATH": os.environ["PATH"],
        "FAL_KEY": "bench:not-a-secret",
        "FALETL_ACCOUNT": "bench",
        "FALETL_API_URL": f"http://127.0.0.1:{port}/v1",
        "FALETL_WAREHOUSE": f"duckdb:///{folder / 'warehouse.duckdb'}",
        "FALETL_LANDING": str(folder / "landing"),
        "FALETL_MEMORY": memory,
        "FALETL_RATE": "0",
    }
    command = [sys.executable, "-m", "faletl", "run", "--start", f"{DAY:%Y-%m-%d}", "--end"]
    command += [f"{DAY + timedelta(days=1):%Y-%m-%d}", "--resource", "usage"]
    command += ["--resource", "billing_events"]
    started = time.monotonic()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, spent = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("faletl run failed")
    expected = sum(event(number, events)[2] for number in range(events)) * NANO_PRICE
    with duckdb.connect(str(folder / "spend.duckdb"), read_only=True) as connection:
        held = connection.execute(
            "select count(*), cast(sum(cost_total) * 1000000000 as hugeint) from marts.fct_billing_event"
        ).fetchone()
    assert held == (events, expected), held
    return {
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(spent.ru_utime + spent.ru_stime, 1),
        "peak_mib": spent.ru_maxrss // 1024,
        "landed_mib": sum(f.stat().st_size for f in (folder / "landing").rglob("*.zst")) // 2**20,
        "warehouse_mib": (folder / "warehouse.duckdb").stat().st_size // 2**20,
    }


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """The lines as a small table."""
    names = list(lines[0])
    yield "  ".join(f"{name:>13}" for name in names)
    for line in lines:
        yield "  ".join(
            f"{line[name]:>13,}" if name != "memory" else f"{line[name]:>13}" for name in names
        )


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("events", type=int, nargs="+", help="how many events the day has")
    parser.add_argument("--memory", default="256MB", help="FALETL_MEMORY of the run")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = []
    for events in asked.events:
        lines.append(measured(events, asked.memory))
        sys.stdout.write(json.dumps(lines[-1]) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\n".join(table(lines)) + "\n")


if __name__ == "__main__":
    main()
