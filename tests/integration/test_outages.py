"""Whatever fal does: readers keep what they had, a sentence says what it was, the next run mends it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import time_machine

from faletl import client as client_module
from faletl import pipeline
from faletl.config import Settings
from faletl.plan import Asked
from faletl.sandbox import Fault, Request, Sandbox
from tests import truth
from tests.conftest import all_tables, ask, opened, published_path, settings_for, total
from tests.servers import free_ports

USAGE_22 = Asked(truth.day(22), truth.day(23), ["usage"])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "TRIES", 2)


def rows(**changed: Any) -> bytes:
    """A page with a row that the account does not have, and that may be broken in these fields."""
    row = {
        "endpoint_id": "x/new", "unit": "images", "quantity": 1, "unit_price": 1, "cost_total": 1,
        "currency": "USD", **changed,
    }  # fmt: skip
    series = [{"bucket": "2026-11-22T05:00:00Z", "results": [row]}]
    return json.dumps({"time_series": series, "next_cursor": None, "has_more": False}).encode()


WHOLE = rows()
ENVELOPE = b'{"error":{"message":"\\u001b[31mbroken\\n2026 INFO all is well"}}'


FAULTS: dict[str, tuple[Fault, int]] = {
    "reset": (Fault(drop=True), 1),
    "429 for a long time": (Fault(status=429, headers={"retry-after": "99999999999"}), 1),
    "gzip without its end": (
        Fault(headers={"content-encoding": "gzip"}, body=gzip.compress(WHOLE)[:-5]),
        3,
    ),
    "error with status 200": (Fault(body=ENVELOPE), 3),
    "bad parameter": (Fault(status=422, body=ENVELOPE), 3),
    "redirect": (Fault(status=302, headers={"location": "http://127.0.0.1:9/"}), 3),
    "more, but no cursor": (Fault(body=WHOLE.replace(b"false", b"true")), 3),
    "NUL": (Fault(body=rows(endpoint_id="a\0")), 3),
    "an id of a megabyte": (Fault(body=rows(endpoint_id="x" * 2**20)), 3),
    "too many fields": (Fault(body=rows(**{f"n{n}": n for n in range(100_000)})), 3),
    "other rows than fal adds up": (Fault(body=WHOLE), 3),
    "revoked key": (Fault(status=401), 2),
}


def test_a_run_that_only_failed_leaves_all_as_it_was_and_the_next_one_mends_it(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = truth.two_days()
    broken: list[Fault] = []

    def fault(request: Request) -> Fault | None:
        is_rows = request.path == "/models/usage" and request.query.get("expand") != ["summary"]
        return broken[-1] if broken and is_rows else None

    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, tmp_path, account="acme")
        assert pipeline.run(settings, Asked(truth.day(21), truth.day(23))).exit_code == 0
        before, held = readers_copy(settings), ask(settings, HELD, opened)
        for name, (broken_by, code) in FAULTS.items():
            broken.append(broken_by)
            report = pipeline.run(settings, USAGE_22)
            assert (report.exit_code, report.build, report.published) == (code, None, None), name
            assert readers_copy(settings) == before, name
            assert ask(settings, HELD, opened) == held, name
            [(_, error)] = report.failures
            check_sentence(str(error), name)
        refused = settings.model_copy(update={"api_url": f"http://127.0.0.1:{free_ports(1)[0]}/v1"})
        report = pipeline.run(refused, USAGE_22)
        assert report.exit_code == 1
        assert "refused" in str(report.failures[0][1])

        broken.clear()
        assert ask(settings, "select count(*) from ops.failures", opened) == [(1,)]
        account.lines.append(truth.line(account.lines[-1].hour, "x/late", "3"))
        assert pipeline.run(settings, USAGE_22).exit_code == 0
    assert total(settings) == sum(one.cost_total for one in account.lines)
    assert ask(settings, "select count(*) from ops.failures") == [(0,)]
    assert ask(settings, "select count(*) from ops.quarantine where resolved_at is null") == [(0,)]


HELD = "select count(*), sum(cost_total), min(_load_id), max(_load_id) from raw.usage"


def readers_copy(settings: Settings) -> object:
    """What readers have: byte for byte where it is a file."""
    if settings.warehouse.startswith("duckdb:"):
        return published_path(settings).read_bytes()
    return all_tables(settings)


ADVICE = re.compile(
    "try again later|run again|check FAL_KEY|quarantine list|is not loaded|reads the window again"
)


def check_sentence(sentence: str, name: str) -> None:
    """It names the place and what to do, and holds nothing that could forge a line of a log."""
    assert sentence.startswith("usage, window 2026-11-22"), sentence
    assert ADVICE.search(sentence), sentence
    assert sentence.isprintable(), sentence
    assert sentence.isascii(), sentence
    assert len(sentence) < 800, sentence
    assert ("(fal request " in sentence) == (name != "reset"), sentence
