"""A large account for benchmarks: pages in a folder, and a server that sends them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import duckdb

from tests.feed import Feed, money

NOTHING = {
    "usage": b'{"time_series":[],"summary":[],"next_cursor":null,"has_more":false}',
    "billing-events": b'{"billing_events":[],"next_cursor":null,"has_more":false}',
}


def write_pages(feed: Feed, folder: Path) -> None:
    """Write all answers: <day>/page-0.json and so on, <day>/usage.json."""
    for number in range(feed.days):
        day = folder / str(feed.day(number))
        day.mkdir(parents=True)
        (day / "usage.json").write_bytes(feed.usage(number))
        for page in range(feed.pages_per_day):
            (day / f"page-{page}.json").write_bytes(feed.page(number, page))


def served_total(feed: Feed) -> tuple[int, str]:
    """Return the number of served charges, and their sum."""
    charges = [event.nano for number in range(feed.days) for event in feed.events(number)]
    return len(charges), money(sum(charges))


def loaded_total(database: Path, table: str) -> tuple[int, str]:
    """Return the number of charges in a table of a DuckDB file, and their sum."""
    with duckdb.connect(str(database), read_only=True) as connection:
        row = connection.execute(
            f"select count(*), cast(cast(sum(cost_total) as decimal(38, 9)) as varchar) from {table}"
        ).fetchone()
    assert row is not None
    return row[0], row[1]


@contextmanager
def serving(folder: Path, latency_s: float = 0) -> Iterator[str]:
    """Serve the folder from another process, each answer after `latency_s` seconds; yield the URL."""
    context = multiprocessing.get_context("fork")
    ready, sender = context.Pipe()
    process = context.Process(target=_serve, args=(folder, latency_s, sender), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ready.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, latency_s: float, sender: Any) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Otherwise a body waits 40 ms for the acknowledgement of its headers.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(latency_s)
            body = _answer(folder, self.path)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sender.send(server.server_address[1])
    server.serve_forever()


def _answer(folder: Path, path: str) -> bytes:
    url = urlsplit(path)
    query = parse_qs(url.query)
    resource = url.path.rpartition("/")[2]
    if resource == "billing":
        return b'{"username":"bench"}'
    day = date.fromisoformat(query["start"][0][:10])
    first = ["summary", "usage"] if query.get("expand") == ["summary"] else ["usage"]
    names = query.get("cursor", first if resource == "usage" else ["page-0"])
    pages = (folder / str(day) / f"{name}.json" for name in names)
    return next((page.read_bytes() for page in pages if page.exists()), NOTHING[resource])
