"""Landing in an object store: the whole line against an S3 server on loopback, and what it refuses."""

from __future__ import annotations

import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import time_machine
from moto.server import ThreadedMotoServer

from faletl import pipeline
from faletl.airflow.runs import selection_of
from faletl.config import Settings
from faletl.errors import SettingsError, StorageError, TamperedError
from faletl.fal.pages import Page
from faletl.landing import extracts
from faletl.landing.extracts import MANIFEST, Call
from faletl.landing.storage import backend_for, parse_location
from faletl.line import distributed
from faletl.operations.maintain import maintain
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.verify import verify
from faletl.resources import USAGE
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from faletl.windows import Window
from tests import truth
from tests.conftest import all_tables, settings_for, total
from tests.forked import Trap, start

USAGE_DAYS = Asked(truth.day(21), truth.day(23), ["usage"])


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """An S3 server that keeps what it is given in memory."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(served: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which AWS's libraries find the server."""
    given = {
        "AWS_ENDPOINT_URL": served,
        "AWS_ACCESS_KEY_ID": "INVENTEDFORTESTS",
        "AWS_SECRET_ACCESS_KEY": "invented/for/tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


@pytest.fixture
def bucket(aws: dict[str, str], request: pytest.FixtureRequest) -> str:
    """The URL of a prefix in a new bucket."""
    name = request.node.name[:60].strip("_").replace("_", "-")
    httpx.put(f"{aws['AWS_ENDPOINT_URL']}/{name}").raise_for_status()
    return f"s3://{name}/landing"


@pytest.fixture
def stored(sandbox: Sandbox, tmp_path: Path, bucket: str) -> Settings:
    """Settings of a run that lands in the bucket."""
    return settings_for(sandbox.url, tmp_path, landing=bucket)


def objects(settings: Settings) -> dict[str, bytes]:
    """All that landed."""
    root = extracts.root(settings)
    return {
        path.relative_to(root).as_posix(): backend_for(path).read(path)
        for path in backend_for(root).matching(root, "*/*/*/*/*")
    }


def is_of_rows(request: Request) -> bool:
    """Whether it asks for lines of usage, not for their total."""
    return request.path == USAGE.path and request.query["expand"] != ["summary"]


def load_days(settings: Settings) -> None:
    """Two closed days of usage in the warehouse, and nothing built."""
    assert pipeline.extract(settings, USAGE_DAYS).exit_code == 0
    assert pipeline.load(settings).exit_code == 0


def test_the_line_leaves_the_tables_of_a_landing_folder_and_prune_and_rebuild_keep_them(
    clock: time_machine.Traveller,
    stored: Settings,
    sandbox: Sandbox,
    account: truth.Account,
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    local = settings_for(sandbox.url, tmp_path / "other")
    for settings in (stored, local):
        assert pipeline.run(settings).exit_code == 0
    assert all_tables(stored) == all_tables(local)
    landed = objects(stored)

    assert pipeline.run(stored, Asked(resources=["models", "prices", "usage"])).exit_code == 0

    assert landed.items() <= objects(stored).items()
    assert all_tables(stored) == all_tables(local)
    assert {path.name for path in tmp_path.iterdir()} == {
        "other", "spend.duckdb", "warehouse.duckdb", "warehouse.duckdb.lock",
    }  # fmt: skip

    account.lines[0] = truth.line(account.lines[0].hour, quantity="9")
    clock.shift(timedelta(days=1))
    pipeline.extract(stored, USAGE_DAYS)  # never to be loaded any more
    clock.shift(60)
    load_days(stored)
    landed = objects(stored)

    dropped, size = prune(stored)

    left = objects(stored)
    assert len(dropped) == 2
    assert left.items() < landed.items()
    assert size == sum(len(landed[name]) for name in landed.keys() - left.keys())
    rebuild(stored)
    before = all_tables(stored)
    assert total(stored) == sum(one.cost_total for one in account.lines)
    rebuild(stored, truth.day(21))
    assert all_tables(stored) == before


def test_a_read_that_is_killed_twice_goes_on_at_the_page_where_it_ended(
    stored: Settings, sandbox: Sandbox, aws: dict[str, str]
) -> None:
    more = {"FALETL_PARALLEL": "1", **aws}
    # The account's name, a question that binds its key, the first page, both of the total, again the
    # first page, the second; the name, the second page, the third.
    for nth in (7, 3):
        kill = Trap("faletl.fal.client.FalClient.get", nth=nth)
        assert start(stored, kill, command="extract", **more).finish()[0] == -signal.SIGKILL
    assert list(extracts.complete_reads(stored)) == []
    with time_machine.travel(truth.NOW, tick=True):
        assert pipeline.extract(stored, USAGE_DAYS).exit_code == 0
    first, _ = map(extracts.open_read, extracts.complete_reads(stored))
    assert extracts.is_intact(first.folder)
    pages = Counter(
        str(request.query.get("cursor"))
        for request in sandbox.requests
        if request.path == USAGE.path and request.query.get("start") == ["2026-11-21T00:00:00Z"]
        if request.query.get("expand") != ["summary"]
    )
    assert len(pages) == len(first.manifest.pages("rows")) == 4
    # The first page on both sides of the total; at each kill a page was received and not yet landed.
    assert pages.total() == len(pages) + 1 + 2
    attempts = [f.name for f in extracts.all_reads(stored) if f.parent == first.folder.parent]
    assert len(attempts) == 3
    assert all(name.startswith(min(attempts)) for name in attempts)  # it began when the first one did


def test_pages_that_were_changed_or_deleted_are_found(
    clock: time_machine.Traveller, stored: Settings
) -> None:
    load_days(stored)
    root = extracts.root(stored)
    first, other = extracts.complete_reads(stored)
    page = backend_for(first).matching(first, "rows-*")[1]
    backend_for(page).write(page, backend_for(page).read(page)[:-1] + b"?")
    with pytest.raises(TamperedError, match="is not the one that fal sent") as changed:
        rebuild(stored)
    assert changed.value.exit_code == 4
    backend_for(other).delete(other / MANIFEST)
    with pytest.raises(TamperedError, match="landed pages of 1 loads are gone"):
        rebuild(stored)
    found = verify(stored).findings
    (sentence,) = found
    assert sentence.startswith("the landed pages of 2 extracts are damaged or gone")
    assert str(page) in sentence
    assert str(root) == stored.landing


def test_the_line_in_pieces_with_a_task_that_comes_twice(
    clock: time_machine.Traveller, sandbox: Sandbox, stored: Settings, account: truth.Account
) -> None:
    for number in range(60):
        account.list_price(f"acme/model-{number:02}", "0.01")
        account.catalogue.append({"endpoint_id": f"acme/model-{number:02}"})
    sandbox.page_size = 100
    for name in ("usage", "models", "prices"):
        path = distributed.write_plan(stored, Asked(resources=[name]))
        assert path is not None
        assert path.startswith(f"{stored.landing}/.plans/")
        batches = distributed.batches(path)
        assert len(batches) == (2 if name == "prices" else 0)
        for batch in [*batches, *batches[:1]]:  # a retry, while the first try may still be at it
            assert distributed.ask_batch(stored, batch)
        before_extract = [request.path for request in sandbox.requests].count("/models/pricing")
        for piece in distributed.chunks(path):
            assert distributed.extract_chunk(stored, piece).exit_code == 0
            before = len(sandbox.requests)
            assert distributed.extract_chunk(stored, piece).exit_code == 0
            assert len(sandbox.requests) == before
        assert distributed.load_plan(stored, path).exit_code == 0
    halved = [r.status for r in sandbox.requests if r.path == "/models/pricing"][before_extract:]
    assert set(halved) == {404}  # the batch with the id that fal does not know
    assert all(map(extracts.is_intact, extracts.complete_reads(stored)))


def test_runs_of_a_backfill_find_out_among_themselves_who_fetches_a_day(
    clock: time_machine.Traveller, stored: Settings
) -> None:
    start, end = Window.of_day(truth.day(21)).start, Window.of_day(truth.day(21)).end
    first, second = (
        SimpleNamespace(
            run_type="backfill", dag_id="fal_usage", run_id=name, logical_date=start,
            data_interval_start=start, data_interval_end=end,
        )
        for name in ("first", "second")
    )  # fmt: skip
    assert selection_of(stored, first, "usage") is not None
    assert selection_of(stored, second, "usage") is None
    assert selection_of(stored, first, "usage") is not None


def test_two_that_read_the_same_window_spoil_nothing_of_each_other(
    clock: time_machine.Traveller, stored: Settings, sandbox: Sandbox
) -> None:
    usage, seen = Asked(truth.day(21), truth.day(22), ["usage"]), list[Request]()

    def meanwhile(request: Request) -> Fault | None:
        if "cursor" in request.query and is_of_rows(request):
            seen.append(request)
            if len(seen) == 1:  # the first page of somebody's read has landed
                assert pipeline.extract(stored, usage).exit_code == 0
        return None

    sandbox.fault = meanwhile
    assert pipeline.extract(stored, usage).exit_code == 0
    reads = list(extracts.complete_reads(stored))
    assert len({extracts.open_read(read).manifest.started_at for read in reads}) == 1
    assert len(reads) == 2
    assert all(map(extracts.is_intact, reads))
    starts = [r for r in sandbox.requests if "cursor" not in r.query and r.path == USAGE.path]
    # One binds the key; the second took over what had landed; each ends with a control total.
    assert len(starts) == 1 + 3 + 2


def test_pages_that_lead_astray_are_not_taken_up_again(
    clock: time_machine.Traveller, stored: Settings, sandbox: Sandbox
) -> None:
    def fails(status: int) -> Callable[[Request], Fault | None]:
        return lambda r: Fault(status=status) if "cursor" in r.query and is_of_rows(r) else None

    usage = Asked(truth.day(21), truth.day(22), ["usage"])
    for status in (401, 400):  # interrupted behind the first page; then its cursor is refused
        sandbox.fault = fails(status)
        assert pipeline.extract(stored, usage).exit_code > 0
    sandbox.fault = None
    sandbox.requests.clear()
    assert pipeline.extract(stored, usage).exit_code == 0
    assert (
        len(list(filter(is_of_rows, sandbox.requests))) == 4 + 1
    )  # the first on both sides of the total


def test_an_interrupted_read_is_dropped_a_day_later_and_cannot_be_sealed_then(
    clock: time_machine.Traveller, stored: Settings, sandbox: Sandbox
) -> None:
    load_days(stored)
    window = Window.of_day(truth.day(21))
    attempt = extracts.begin(stored, "acme", "usage", window, now=truth.NOW)
    call = Call("rows", USAGE.path, {}, [attempt.land("rows", {}, Page(1, b"{}", None, 0, None))])
    clock.shift(timedelta(hours=2))
    assert prune(stored)[0] == []
    assert extracts.resume(stored, "acme", "usage", window, since=truth.NOW + timedelta(hours=1)) is None
    clock.shift(timedelta(days=1))
    assert attempt.folder in prune(stored)[0]
    complete = list(extracts.complete_reads(stored))
    manifest = msgspec.structs.replace(extracts.open_read(complete[0]).manifest, calls=[call])
    with pytest.raises(StorageError, match="was deleted while the window was fetched"):
        attempt.seal(manifest)
    assert list(extracts.complete_reads(stored)) == complete


class Refusing(BaseHTTPRequestHandler):
    """An S3 that knows nobody."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the terminal for what matters."""


def test_maintain_frees_there_what_it_frees_in_a_folder(
    clock: time_machine.Traveller, stored: Settings, account: truth.Account
) -> None:
    settings = stored.model_copy(update={"keep_days": 1})
    pipeline.run(settings, Asked(resources=["usage"]))
    for _ in range(4):
        clock.shift(timedelta(hours=1))
        account.lines.append(truth.line(truth.NOW.replace(minute=0, hour=5), truth.FLUX, "2"))
        pipeline.run(settings, Asked(resources=["usage", "credits"]))
    clock.shift(timedelta(days=3))
    landed, before = len(objects(settings)), all_tables(settings)

    freed = {one.kind: one for one in maintain(settings).freed}

    assert freed["snapshots equal to the one before"].files == 2 * 3  # of four readings two
    assert freed["superseded extracts"].files == 4 * 4  # of five of that day four
    assert len(objects(settings)) == landed - 2 * 3 - 4 * 4
    again = [one for one in maintain(settings).freed if one.kind != "abandoned temporary folders"]
    assert not any((one.rows, one.files) != (0, 0) for one in again)
    after = all_tables(settings)
    assert {table for table in before if before[table] != after[table]} == {
        "raw.credits", "staging.stg_fal__credits", "marts.fct_credit_balance",
    }  # fmt: skip
    rebuild(settings)
    assert all_tables(settings) == after


def test_a_store_that_refuses_or_has_no_such_bucket_is_told_in_a_sentence_before_fal_is_asked(
    aws: dict[str, str], stored: Settings, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gone,) = pipeline.run(stored.model_copy(update={"landing": "s3://nowhere/landing"})).failures
    assert str(gone[1]) == (
        "cannot use s3://nowhere/landing: there is no such bucket; make it, or correct FALETL_LANDING"
    )
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        report = pipeline.run(stored.model_copy(update={"landing": "s3://locked/landing"}))
        server.shutdown()
    ((_, refused),) = report.failures
    assert isinstance(refused, StorageError)
    assert report.exit_code == 1
    assert "No such key.; check the store's credentials" in str(refused)
    assert aws["AWS_SECRET_ACCESS_KEY"] not in str(refused)
    assert sandbox.requests == []


def test_an_object_that_cannot_be_had_is_not_taken_for_one_that_is_gone(
    clock: time_machine.Traveller, stored: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_days(stored)

    def out(*_: object, **__: object) -> None:
        raise TimeoutError("nobody answers")

    fs: Any = extracts.root(stored).fs  # type: ignore[attr-defined]  # of a UPath
    for question in ("ls", "find", "cat_file"):
        monkeypatch.setattr(fs, question, out)
    for ask in (lambda: list(extracts.complete_reads(stored)), lambda: verify(stored)):
        with pytest.raises(StorageError, match="nobody answers"):
            ask()


@pytest.mark.parametrize("url", ["s3://bucket/landing", "gs://bucket/landing", "nonsense://bucket"])
def test_what_is_not_installed_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if url.startswith("s3"):
        monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(
        SettingsError,
        match=r"FALETL_LANDING: .* (pip install '/path/to/faletl\[s3\]'|not an object store)",
    ):
        parse_location(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:invented@bucket/landing",
        "s3://bucket?secret=invented",
        "s3:/bucket",
        "file:///invented",
    ],
)
def test_a_url_that_is_no_place_or_holds_a_secret_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(SettingsError, match="FALETL_LANDING: must be a folder, or a URL") as refused:
        Settings.isolated(landing=url)
    assert "invented" not in str(refused.value)
