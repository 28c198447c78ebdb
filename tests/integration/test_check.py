"""`faletl check`: each way in which a key, a host or a network can be wrong, and what is said of it."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trustme

from faletl.config import Settings
from faletl.errors import SettingsError
from faletl.fal.limiter import Patience
from faletl.operations import check as check_module
from faletl.operations.check import KNOWN_ENDPOINT, LIMITED, CheckReport, check
from faletl.resources import ANALYTICS, BILLING_EVENTS, CREDITS, KEY_COMMAND, RESOURCES, USAGE, Resource
from faletl.sandbox import BILLING_KEY, FULL_KEY, READONLY_KEY, Fault, Request, Sandbox
from faletl.sandbox.server import document_as_of
from tests import truth
from tests.conftest import settings_for
from tests.integration.test_cli import faletl
from tests.integration.test_client import RawServer, good, head, tls_of
from tests.limits import fixed

CANARY = "canary-id:canary-secret-0123456789"
HTML = b"<!doctype html><html><body>Welcome</body></html>"
Hook = Callable[[Request], Fault | None]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faletl.fal.client.BACKOFF_SECONDS", 0.01)


@contextmanager
def served(hook: Hook | None = None, **given: object) -> Iterator[tuple[Settings, Sandbox]]:
    """Settings for a served account, and its server."""
    with Sandbox(truth.two_days(), fault=hook) as server:
        yield settings_for(server.url, Path(), **given), server


def on(path: str, fault: Fault) -> Hook:
    """Break the answers of one path."""
    return lambda request: fault if request.path == path else None


def readable(checked: CheckReport) -> dict[str, bool | None]:
    return {one.resource: one.is_readable for one in checked.findings}


def sentences(checked: CheckReport) -> str:
    return "\n".join([f.sentence for f in checked.findings] + [p.sentence for p in checked.problems])


ALL = dict.fromkeys(RESOURCES, True)


# --- Keys -----------------------------------------------------------------------------------------


def test_a_key_that_reads_everything_is_found_good_in_few_tiny_questions() -> None:
    with served() as (settings, server):
        begun = time.monotonic()
        checked = check(settings)
        assert time.monotonic() - begun < 5
        assert readable(checked) == ALL
        assert (checked.account, checked.exit_code, sentences(checked).strip()) == ("acme", 0, "")
        assert len(server.requests) == 8
        for request in server.requests:
            assert (request.method, request.status) == ("GET", 200)
            if "start" in request.query:
                start, end = (
                    datetime.fromisoformat(request.query[name][0]) for name in ("start", "end")
                )
                assert end - start == timedelta(hours=1)
                assert end <= datetime.now(UTC) - timedelta(minutes=5)
            assert ("limit" in request.query) == (request.path in LIMITED)
            assert len(request.query.get("endpoint_id", [])) <= 1
    assert list(Path().iterdir()) == []


def test_paths_that_take_a_limit_are_those_that_document_it() -> None:
    document = document_as_of(None)
    limited = {
        path
        for path in {resource.path for resource in RESOURCES.values()}
        if any(
            one.get("$ref", "").endswith("/limit")
            for one in document["paths"][path]["get"]["parameters"]
        )
    }
    assert limited == LIMITED


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        (FULL_KEY, ()),
        (BILLING_KEY, (ANALYTICS,)),
        (READONLY_KEY, (USAGE, BILLING_EVENTS)),
    ],
)
def test_what_a_key_may_not_read_is_told_with_what_it_needs_and_how_to_make_one_that_reads_it(
    key: str, missing: tuple[Resource, ...]
) -> None:
    with served(key=key) as (settings, _):
        checked = check(settings)
    assert readable(checked) == {**ALL, **{one.name: False for one in missing}}
    assert checked.exit_code == (2 if missing else 0)
    for finding in checked.findings:
        if not finding.is_readable:
            assert finding.sentence.startswith(f"FAL_KEY needs {RESOURCES[finding.resource].needs}; ")
            assert KEY_COMMAND in finding.sentence
    assert checked.problems == []


def test_the_least_key_reads_everything_and_none_of_its_permissions_can_be_spared() -> None:
    permissions = KEY_COMMAND.split()[4].split(",")
    assert set(permissions) == {
        "billing:usage:read", "auth:keys:read", "account:users:read", "models:metrics:read",
    }  # fmt: skip
    for spared in (None, *permissions):
        least = ",".join(name for name in permissions if name != spared)
        with Sandbox(truth.two_days(), keys={FULL_KEY: least}) as server:
            checked = check(settings_for(server.url, Path()))
        assert (readable(checked) == ALL) == (spared is None), spared


@pytest.mark.parametrize("document", ["README.md", "docs/fal-api.md", "docs/airflow.md", ".env.example"])
def test_every_document_that_speaks_of_keys_teaches_the_command_that_faletl_names(document: str) -> None:
    text = (Path(__file__).parents[2] / document).read_text("utf-8")
    assert KEY_COMMAND in text
    assert "preset BILLING or FULL" not in text


def test_two_keys_share_the_work_and_it_is_told_which_reads_what() -> None:
    with served(key=BILLING_KEY, metrics_key=READONLY_KEY) as (settings, server):
        checked = check(settings)
    assert (readable(checked), checked.exit_code) == (ALL, 0)
    used = {one.resource: one.key_name for one in checked.findings}
    assert {name for name, key in used.items() if key == "FAL_METRICS_KEY"} == {"models", "analytics"}
    sent = {(request.path, request.headers["authorization"]) for request in server.requests}
    assert ("/models/analytics", f"Key {READONLY_KEY}") in sent
    assert ("/models/usage", f"Key {BILLING_KEY}") in sent


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_fal_does_not_know_is_told_as_one_thing_in_few_questions(status: int) -> None:
    """Where the catalogue is open to any key, and where it is not."""
    for is_open in (True, False):

        def refuse(request: Request, is_open: bool = is_open) -> Fault | None:
            return None if is_open and request.path == "/models" else Fault(status=status)

        with served(refuse) as (settings, server):
            checked = check(settings)
            assert len(server.requests) <= 4
        assert readable(checked) == {**dict.fromkeys(RESOURCES, False), "models": is_open}
        (problem,) = checked.problems
        assert "does not accept FAL_KEY" in problem.sentence
        assert checked.exit_code == 2


@pytest.mark.parametrize("is_open", [True, False])
def test_a_locked_account_is_said_to_be_locked_and_no_key_is_blamed(is_open: bool) -> None:
    """Where the catalogue is open to everybody, and where it is not."""
    told = "User is locked. Reason: Admin lock. Please contact support@fal.ai"

    def lock(request: Request) -> Fault | None:
        if is_open and request.path == "/models":
            return None
        return Fault(status=403, body=json.dumps({"detail": told}).encode())

    with served(lock) as (settings, server):
        checked = check(settings)
        assert len(server.requests) == 1 + is_open
    (problem,) = checked.problems
    assert told in problem.sentence
    assert "another key will not help" in problem.sentence
    assert "mistyped" not in sentences(checked)
    assert "needs" not in sentences(checked)
    assert readable(checked) == {**dict.fromkeys(RESOURCES), "models": True if is_open else None}
    assert checked.exit_code == 2
    assert checked.why_refused == problem.sentence


def test_a_check_of_an_account_with_a_limit_asks_more_slowly() -> None:
    limit = fixed(1, 0.5, is_told=False)

    def refuse(_: Request) -> Fault | None:
        return None if limit(time.monotonic()) is None else Fault(status=429)

    with served(refuse, rate=5) as (settings, _):
        checked = check(settings)
    assert (readable(checked), checked.exit_code) == (ALL, 0), sentences(checked)


def test_a_bad_metrics_key_does_not_spoil_the_other() -> None:
    with served(key=FULL_KEY, metrics_key="un:known-key") as (settings, _):
        checked = check(settings)
    assert readable(checked) == {**ALL, "analytics": False}
    (problem,) = checked.problems
    assert "does not accept FAL_METRICS_KEY" in problem.sentence
    assert checked.exit_code == 2


def test_a_summary_that_is_refused_to_a_key_that_reads_the_rows_is_no_fault() -> None:
    def refuse(request: Request) -> Fault | None:
        return Fault(status=401) if request.query.get("expand") == ["summary"] else None

    with served(refuse) as (settings, server):
        checked = check(settings)
        assert sum(request.query.get("expand") == ["summary"] for request in server.requests) == 1
    assert (readable(checked), checked.exit_code) == (ALL, 0)
    told = {one.resource for one in checked.findings if "two identical fetches prove" in one.sentence}
    assert told == {"usage", "billing_events"}


def test_an_account_that_fal_does_not_name_is_left_open() -> None:
    with served(on("/account/billing", Fault(status=403))) as (settings, _):
        checked = check(settings)
    assert (checked.account, readable(checked)) == (None, {**ALL, "credits": False})
    assert CREDITS.needs in sentences(checked)
    assert checked.exit_code == 2


def test_no_key_is_told_before_anything_is_asked() -> None:
    with served(key=None) as (settings, server):
        with pytest.raises(SettingsError, match="FAL_KEY is not set"):
            check(settings)
        assert server.requests == []


# --- Questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("day", [date(2026, 3, 18), date(2026, 7, 25), None])
def test_older_servers_are_asked_as_a_run_asks_them(day: date | None) -> None:
    with Sandbox(truth.two_days(), as_of=day) as server:
        checked = check(settings_for(server.url, Path()))
    assert (readable(checked), checked.exit_code) == (ALL, 0), sentences(checked)


def test_ids_come_from_the_catalogue_and_else_are_well_known() -> None:
    def asked(server: Sandbox) -> list[str]:
        return [one for request in server.requests for one in request.query.get("endpoint_id", [])]

    with served() as (settings, server):
        server.world.catalogue.insert(0, {"endpoint_id": "acme/first"})  # type: ignore[attr-defined]  # an Account
        assert check(settings).exit_code == 0
        assert set(asked(server)) == {"acme/first"}
    with served() as (settings, server):
        server.world.catalogue.clear()  # type: ignore[attr-defined]  # an Account
        assert check(settings).exit_code == 0
        assert set(asked(server)) == {KNOWN_ENDPOINT}

    def forget(request: Request) -> Fault | None:
        return Fault(status=404) if request.query.get("endpoint_id") == ["acme/first"] else None

    with served(forget) as (settings, server):
        server.world.catalogue.insert(0, {"endpoint_id": "acme/first"})  # type: ignore[attr-defined]  # an Account
        assert (readable(checked := check(settings)), checked.exit_code) == (ALL, 0)


# --- Hosts and networks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=404), "no catalogue of models (404)"),
        (Fault(status=404, body=HTML), "no catalogue of models (404)"),
        (Fault(status=200, body=HTML), "a web page"),
        (
            Fault(status=301, headers={"location": "https://example.com/v1"}, body=b""),
            "redirects to another host",
        ),
        (Fault(status=308, headers={"location": "/v2/models"}, body=b""), "redirects to another host"),
    ],
)
def test_a_host_that_is_not_fal_is_a_wrong_setting(fault: Fault, said: str) -> None:
    with served(lambda _: fault) as (settings, server):
        checked = check(settings)
        assert len(server.requests) <= 2
    (problem,) = checked.problems
    assert said in problem.sentence
    assert "FALETL_API_URL" in problem.sentence
    assert readable(checked) == dict.fromkeys(RESOURCES)
    assert checked.exit_code == 2


def test_no_network_is_told_by_its_kind_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        monkeypatch.setattr(check_module, "PATIENCE", Patience(2, 0.2, 0))
        silent = check(settings_for(url, Path()))
    refused = check(settings_for(url, Path()))

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    nowhere = check(settings_for("https://nowhere.invalid/v1", Path()))
    for checked, said in (
        (silent, "in time"),
        (refused, "refuses connections"),
        (nowhere, "no address"),
    ):
        (problem,) = checked.problems
        assert said in problem.sentence
        assert checked.exit_code == 1
        assert readable(checked) == dict.fromkeys(RESOURCES)


def test_a_certificate_that_nobody_vouches_for_is_a_setting() -> None:
    with RawServer(good, tls=tls_of(trustme.CA())) as server:
        checked = check(settings_for(server.url, Path()))
        assert server.heads == []
    (problem,) = checked.problems
    assert "does not trust the certificate" in problem.sentence
    assert checked.exit_code == 2


def test_a_proxy_that_refuses_is_a_setting_and_one_that_is_down_is_named() -> None:
    def refuse(connection: socket.socket) -> None:
        connection.sendall(head("Content-Length: 0", status="407 Proxy Authentication Required"))

    with RawServer(refuse) as proxy:
        settings = settings_for("https://nowhere.invalid/v1", Path(), proxy=f"http://{proxy.address}")
        refused = check(settings)
    down = check(settings)
    assert "correct FALETL_PROXY" in sentences(refused)
    assert "through the proxy of FALETL_PROXY" in sentences(down)
    assert (refused.exit_code, down.exit_code) == (2, 1)


def test_a_network_that_goes_down_meanwhile_ends_the_check_and_keeps_what_is_known() -> None:
    with served(on("/models/billing-events", Fault(drop=True))) as (settings, server):
        checked = check(settings)
        assert [r.path for r in server.requests][-1] == "/models/billing-events"
    assert readable(checked) == {**dict.fromkeys(RESOURCES), "models": True, "usage": True}
    assert checked.exit_code == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=500),
        Fault(status=429, headers={"retry-after": "60"}),
        Fault(status=403, body=HTML),
    ],
)
def test_a_fal_that_is_down_may_be_tried_again_and_is_not_waited_for(fault: Fault) -> None:
    with served(lambda _: fault) as (settings, _):
        begun = time.monotonic()
        checked = check(settings)
        assert time.monotonic() - begun < 10
    assert readable(checked) == dict.fromkeys(RESOURCES)
    assert checked.exit_code == 1
    assert "try again later" in sentences(checked)


def test_one_resource_that_is_down_does_not_hide_the_others() -> None:
    with served(on("/models/billing-events", Fault(status=500))) as (settings, _):
        checked = check(settings)
    assert readable(checked) == {**ALL, "billing_events": None}
    assert checked.exit_code == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=b'{"hello": "world"}'),
        Fault(body=b"[]"),
        Fault(body=b'{"time_series": ['),
        Fault(status=204, body=b""),
        Fault(status=400),
        Fault(status=418),
    ],
)
def test_an_answer_that_breaks_the_contract_is_one(fault: Fault) -> None:
    with served(on("/models/usage", fault)) as (settings, _):
        checked = check(settings)
    assert readable(checked)["usage"] is None
    assert readable(checked)["credits"] is True
    assert checked.exit_code == 3


@pytest.mark.parametrize(("minutes", "is_told"), [(-60, True), (6, True), (4, False)])
def test_a_clock_that_is_wrong_is_a_warning(minutes: int, is_told: bool) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    with served(lambda _: Fault(headers={"date": at})) as (settings, _):
        checked = check(settings)
    assert (readable(checked), checked.exit_code) == (ALL, 0)
    assert (f"by {abs(minutes)} minutes" in sentences(checked)) == is_told


# --- From a terminal ------------------------------------------------------------------------------


def test_the_table_names_each_resource_and_the_account(tmp_path: Path) -> None:
    with served(key=BILLING_KEY) as (settings, _):
        one = faletl("check", settings=settings, folder=tmp_path, FAL_KEY=BILLING_KEY)
        two = faletl(
            "check", settings=settings, folder=tmp_path,
            FAL_KEY=BILLING_KEY, FAL_METRICS_KEY=READONLY_KEY, FALETL_ACCOUNT="main",
        )  # fmt: skip
    assert (one.returncode, one.stderr) == (2, "")
    assert one.stdout.startswith("Account: acme\nresource ")
    assert re.search(r"^usage +yes *$", one.stdout, re.MULTILINE)
    assert re.search(r"^analytics +no +FAL_KEY needs models:metrics:read \(preset API", one.stdout, re.M)
    assert (two.returncode, two.stderr) == (0, "")
    assert two.stdout.startswith("Account: acme, labelled main (FALETL_ACCOUNT)\n")
    assert re.search(r"^analytics +FAL_METRICS_KEY +yes *$", two.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_one_sentence_and_its_code(tmp_path: Path) -> None:
    html = lambda _: Fault(body=HTML)  # noqa: E731
    with served(html) as (settings, _):
        done = faletl("check", settings=settings, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("faletl: http://127.0.0.1:")
    assert len(done.stderr.splitlines()) == 1
    done = faletl("check", settings=settings, folder=tmp_path)  # nobody listens any more
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    done = faletl("check", settings=settings, folder=tmp_path, FAL_KEY="")
    assert done.returncode == 2
    assert "FAL_KEY is not set" in done.stderr


@pytest.mark.parametrize("status", [200, 403, 500])
def test_a_check_never_shows_a_key_that_was_echoed(status: int, tmp_path: Path) -> None:
    def echo(request: Request) -> Fault | None:
        said = {"error": {"message": f"bad header {request.headers['authorization']}"}}
        return (
            None if request.path == "/models" else Fault(status=status, body=json.dumps(said).encode())
        )

    with served(echo) as (settings, _):
        done = faletl("--debug", "check", settings=settings, folder=tmp_path, FAL_KEY=CANARY)
    assert done.returncode != 0
    told = done.stdout + done.stderr
    secret = CANARY.split(":")[1]
    assert not any(secret[first : first + 8] in told for first in range(len(secret) - 7))
