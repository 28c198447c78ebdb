"""The parts that DAGs are made of: connection, retry policy, notifier, pool, which days a run means."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import time_machine

from faletl.airflow.runs import selection_of
from faletl.sandbox import Sandbox
from tests.airflow.conftest import Airflow
from tests.conftest import settings_for
from tests.leaks import leaks

pytestmark = pytest.mark.xdist_group("airflow")  # which is imported once a process

HOUR = timedelta(hours=1)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)

# What the processes below print: the outcome of one part of faletl.airflow, in a real Airflow.
SETTINGS = """
from faletl.airflow.hook import FalHook
from faletl.errors import FaletlError
try:
    s = FalHook({connection!r}).settings()
    print([s.key_for(), s.key_for(metrics=True), s.api_url, s.account, s.rate, s.warehouse])
except FaletlError as error:
    print([str(error)])
"""


def answer(airflow: Airflow, code: str, **more: str) -> Any:
    """What a process with that code prints last."""
    return eval(airflow.run(code, **more).splitlines()[-1])  # noqa: S307  # printed by the code above


# --- The connection -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (
            {"password": "a:bcdefghijk", "extra": {"metrics_api_key": "c:d", "account": "x", "rate": 2}},
            ["a:bcdefghijk", "c:d", "https://api.fal.ai/v1", "x", 2],
        ),
        ({"password": "a:b", "host": "", "extra": {"account": "", "rate": None}},
         ["a:b", "a:b", "https://api.fal.ai/v1", None, 5]),
        ({"password": "a:b", "host": "http://127.0.0.1:1/v1"},
         ["a:b", "a:b", "http://127.0.0.1:1/v1", None, 5]),
    ],
    ids=["all", "empty fields", "base URL"],
)  # fmt: skip
def test_settings_come_from_the_connection_and_else_from_the_environment(
    airflow: Airflow, made: dict[str, Any], expected: list[Any]
) -> None:
    connection = json.dumps({"conn_type": "fal", **made})

    found = answer(
        airflow, SETTINGS.format(connection="fal_default"), AIRFLOW_CONN_FAL_DEFAULT=connection
    )

    assert found == [*expected, airflow.warehouse]


FORMS = """
import json, os
from urllib.parse import quote
from airflow.sdk.log import redact
from faletl.airflow.hook import FalHook

def coded(text):
    return quote(text, safe="")

def forms(key_id, secret):
    key = f"{key_id}:{secret}"
    yield json.dumps({"conn_type": "fal", "password": key})
    yield json.dumps({"conn_type": "fal", "login": key_id, "password": secret})
    yield json.dumps({"conn_type": "fal", "login": key_id, "password": key})
    yield json.dumps({"conn_type": "fal", "login": f" {key_id} ", "password": f"{secret}\\n"})
    yield f"fal://{coded(key_id)}:{coded(secret)}@"
    yield f"fal://{coded(key_id)}:{coded(secret)}@?rate=5"
    yield f"fal://{coded(key_id)}:{coded(secret)}@{coded('https://api.fal.ai/v1')}"
    yield f"fal://:{coded(key)}@"

found = []
for key in KEYS:
    for made in forms(*key.split(":")):
        os.environ["AIRFLOW_CONN_FAL_DEFAULT"] = made
        settings = FalHook().settings()
        found.append((made, key, settings.key_for(), redact(f"told {' and '.join(key.split(':'))}")))
print(found)
"""


def test_each_form_of_a_connection_gives_the_key_and_hides_both_halves_of_it(airflow: Airflow) -> None:
    keys = ["b4a57e57-0c0d:0f5ec7e70f5ec7e7", "an+id/with=signs:s%e?c&r#e@t/0123"]
    found = answer(airflow, FORMS.replace("KEYS", repr(keys)))
    assert len(found) == 16
    for made, key, given, shown in found:
        assert given == key, made
        assert shown == "told *** and ***", made


@pytest.mark.parametrize(
    ("env", "connection", "expected"),
    [
        ({"FAL_KEY": "e:nvironment"}, "fal_default", "e:nvironment"),
        ({}, "fal_acme", "there is no connection 'fal_acme'; create one of type fal"),
        (
            {"AIRFLOW_CONN_FAL_ACME": '{"conn_type": "http"}'}, "fal_acme",
            "the connection 'fal_acme' is of type 'http', not fal",
        ),
        (
            {"AIRFLOW_CONN_FAL_WAREHOUSE": '{"conn_type": "sqlite", "host": "x"}'}, "fal_default",
            "the connection 'fal_warehouse' must be of type postgres, or of type duckdb",
        ),
        (
            {"AIRFLOW_CONN_FAL_DEFAULT": '{"conn_type": "fal", "password": "nonsense"}'}, "fal_default",
            "FAL_KEY: a fal key looks like key_id:secret",
        ),
    ],
    ids=["no connection", "another that is missing", "of another type", "warehouse", "no key"],
)  # fmt: skip
def test_what_is_missing_or_wrong_of_a_connection_is_said(
    airflow: Airflow, env: dict[str, str], connection: str, expected: str
) -> None:
    assert str(answer(airflow, SETTINGS.format(connection=connection), **env)[0]).startswith(expected)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ('{"conn_type": "fal", "login": "canary-id"}', "needs the whole key"),
        ('{"conn_type": "fal", "login": "canary-id:canary-secret"}', "needs the whole key"),
        (
            '{"conn_type": "fal", "login": "admin", "password": "canary-id:canary-secret"}',
            "needs the whole key",
        ),
        ("fal://canary-id:canary-secret", "Airflow cannot read the connection in AIRFLOW_CONN_FAL_"),
        ('{"conn_type": "fal", "password": "canary-id:canary-secret",}', "Airflow cannot read"),
    ],
    ids=["key id alone", "key as login", "another login", "URI without an @", "no JSON"],
)
def test_a_connection_without_a_whole_key_is_refused_and_no_other_key_is_taken(
    airflow: Airflow, made: str, expected: str
) -> None:
    code = SETTINGS.format(connection="fal_default")
    (said,) = answer(airflow, code, AIRFLOW_CONN_FAL_DEFAULT=made, FAL_KEY="of:the-environment")
    assert expected in said
    assert "canary" not in said


@pytest.mark.parametrize(
    ("made", "url"),
    [
        ("duckdb:////data/f.duckdb", "duckdb:////data/f.duckdb"),
        ('{"conn_type": "duckdb", "host": "/data/f.duckdb"}', "duckdb:////data/f.duckdb"),
        (
            "postgres://loader:p%40ss%2Fword@db.example.com:6432/spend?sslmode=require&cursor=x",
            "postgresql://loader:p%40ss%2Fword@db.example.com:6432/spend?sslmode=require",
        ),
    ],
    ids=["file as URI", "file as JSON", "server"],
)
def test_the_warehouse_comes_from_a_connection_too(airflow: Airflow, made: str, url: str) -> None:
    found = answer(airflow, SETTINGS.format(connection="fal_default"), AIRFLOW_CONN_FAL_WAREHOUSE=made)
    assert found[-1] == url


def test_the_button_test_says_what_faletl_check_says(airflow: Airflow, invented: Sandbox) -> None:
    code = """
from airflow.models.connection import Connection
import json, os
print([Connection.from_json(os.environ[f"AIRFLOW_CONN_{name}"], conn_id=name.lower()).test_connection()
       for name in ("FAL_DEFAULT", "FAL_ACME")])
"""
    airflow.connect(invented.url)
    airflow.connect(invented.url, "unknown:0123456789abcdef", connection="fal_acme")

    (is_good, good), (is_bad_good, bad) = answer(airflow, code)

    assert is_good, good
    assert good.startswith(
        "account sandbox: usage, billing_events, credits, models, analytics, prices can"
    )
    assert not is_bad_good
    assert "fal does not accept FAL_KEY for anything: it is mistyped or revoked" in bad


KEY, METRICS_KEY = "canary-kid-7c1d:canary-secret-0123456789", "another-kid-e8f2:another-secret-98765"


def test_airflow_knows_the_connection_type_hides_its_keys_and_makes_the_pool_once(
    airflow: Airflow,
) -> None:
    code = """
import json
from airflow.api_fastapi.core_api.datamodels.connections import ConnectionResponse
from airflow.models.connection import Connection
from airflow.providers_manager import ProvidersManager
from airflow.models.pool import Pool
from airflow.listeners.listener import get_listener_manager
manager = ProvidersManager()
fields = [name for name in manager.connection_form_widgets if name.startswith("extra__fal__")]
behaviour = manager.field_behaviours["fal"]
get_listener_manager().hook.on_starting(component=object())
first = Pool.get_pool("faletl_warehouse").slots
Pool.create_or_update_pool("faletl_warehouse", 2, "by hand", False)
get_listener_manager().hook.on_starting(component=object())
made = Connection(conn_id="fal_x", conn_type="fal", password="KEY",
                  extra=json.dumps({"metrics_api_key": "METRICS", "account": "acme"}))
shown = ConnectionResponse.model_validate(made, from_attributes=True).model_dump_json()
print([manager.hooks["fal"].hook_name, fields, behaviour["relabeling"], first,
       Pool.get_pool("faletl_warehouse").slots, shown])
"""
    code = code.replace('"KEY"', repr(KEY)).replace('"METRICS"', repr(METRICS_KEY))
    name, fields, labels, first, kept, shown = answer(airflow, code)
    assert "acme" in shown  # as the server tells a connection to whoever may look at it
    assert leaks(KEY, shown.encode()) | leaks(METRICS_KEY, shown.encode()) == set()
    assert name == "fal.ai"
    assert {one.rpartition("__")[2] for one in fields} == {"metrics_api_key", "account", "rate"}
    assert labels == {"login": "Key id", "password": "Key", "host": "Base URL"}
    assert (first, kept) == (1, 2)


# --- Retries and notices --------------------------------------------------------------------------


def test_what_is_tried_again_follows_from_the_error(airflow: Airflow) -> None:
    code = """
from faletl import errors
from faletl.airflow.retry import FalRetryPolicy
def decided(error):
    made = FalRetryPolicy().evaluate(error, 1, 5)
    return made.action.value, made.retry_delay and made.retry_delay.total_seconds(), made.reason
print([decided(error) for error in (
    errors.KeyRefusedError("replace it"), errors.DataRefusedError("bad"), errors.TamperedError("look"),
    errors.SettingsError("wrong"), errors.ApiUnavailableError("429", retry_after=90),
    errors.ApiUnavailableError("never", retry_after=10**15),
    errors.ApiUnavailableError("503"), errors.WarehouseBusyError("held"), ValueError("a bug"),
    errors.AccountLockedError("locked"), errors.CircuitOpenError("gone", retry_after=300),
    errors.CircuitOpenError("gone"),
)])
"""
    assert answer(airflow, code) == [
        ("fail", None, "replace it"),
        ("fail", None, "bad"),
        ("fail", None, "look"),
        ("fail", None, "wrong"),
        ("retry", 90, "429; try again later"),
        ("retry", 86_400, "never; try again later"),
        ("default", None, None),
        ("default", None, None),
        ("default", None, None),
        ("fail", None, "locked; another key will not help; follow fal's message, then run again"),
        ("retry", 300, "gone; try again later"),
        ("default", None, None),
    ]


def test_a_notice_goes_to_the_webhook_and_its_url_to_no_log(
    airflow: Airflow, webhook: tuple[str, list[Any]]
) -> None:
    url, posted = webhook
    code = """
import asyncio
from faletl.airflow.notifier import FalNotifier, announce
FalNotifier("runaway: {{ what }}")({"what": "a charge"})
announce("refused", "x/{{ conn.fal_default.password }} {% {#")  # what fal sent is no template
asyncio.run(FalNotifier("late").async_notify({}))
"""

    for path in ("/hook-secret", "/gone-secret"):
        connection = json.dumps({"conn_type": "generic", "password": url + path})
        assert path not in airflow.run(code, AIRFLOW_CONN_FAL_NOTIFY=connection)
    alone = airflow.run(code)

    assert (
        posted
        == [
            {"text": "runaway: a charge"},
            {"text": "refused: x/{{ conn.fal_default.password }} {% {#"},
            {"text": "late"},
        ]
        * 2
    )
    assert "runaway: a charge" in alone


LOCKED = """
from airflow.sdk.exceptions import AirflowSkipException
from faletl import errors
from faletl.airflow import tasks
from faletl.resources import RESOURCES

class Sibling(errors.FaletlError):
    exit_code = 2

class Kind(errors.KeyRefusedError):
    pass

found = []
for error in (Sibling("User is locked"), Kind("User is locked"), errors.KeyRefusedError("refused")):
    try:
        with tasks._settings("fal_default", RESOURCES["analytics"]):
            raise error
    except (errors.FaletlError, AirflowSkipException) as raised:
        decided = tasks.FalRetryPolicy().evaluate(raised, 1, 5)
        found.append((type(raised).__name__, str(raised), decided.action.value))
print([*found, [type(min(some, key=tasks._rank)).__name__ for some in (
    [errors.DataRefusedError("a"), errors.ApiUnavailableError("b")],
    [errors.ApiUnavailableError("a"), Sibling("b"), errors.TamperedError("c")],
)]])
"""


def test_what_no_other_key_can_help_is_told_as_it_is_and_fails_at_once(
    airflow: Airflow, served: Sandbox
) -> None:
    airflow.connect(served.url)
    *kinds, refused, ranks = answer(airflow, LOCKED)
    assert kinds == [(kind, "User is locked", "fail") for kind in ("Sibling", "Kind")]
    assert refused[:2] == ("AirflowSkipException", "refused")  # the key is fine: analytics are left out
    assert ranks == ["ApiUnavailableError", "Sibling"]


# --- Which days a run means -----------------------------------------------------------------------


def run_of(kind: str, start: datetime | None, hours: int = 1) -> Any:
    """A DAG run over so many hours from `start`, as Airflow shows it to a task."""
    return SimpleNamespace(
        dag_id="fal_usage",
        run_id=f"{kind}__{start}",
        run_type=kind,
        logical_date=start,
        data_interval_start=start,
        data_interval_end=start and start + timedelta(hours=hours),
    )


def fetched(folder: Path, runs: list[Any], resource: str = "usage") -> list[tuple[date, date] | None]:
    """The days that runs fetch anew, one after another; None for those that fetch none."""
    settings = settings_for("http://127.0.0.1:1", folder)
    found = [selection_of(settings, run, resource) for run in runs]
    return [(one.start, one.end) if one and one.start and one.end else None for one in found]


def test_scheduled_and_asset_triggered_runs_do_what_is_due(tmp_path: Path) -> None:
    settings = settings_for("http://127.0.0.1:1", tmp_path)
    for run in (run_of("scheduled", NOON), run_of("asset_triggered", None), run_of("manual", None)):
        due = selection_of(settings, run, "usage")
        assert due is not None
        assert (due.start, list(due.resources)) == (None, ["usage"])


@pytest.mark.parametrize(
    ("start", "hours", "days"),
    [
        (NOON, 1, (date(2026, 11, 20), date(2026, 11, 21))),
        (datetime(2026, 11, 20, 23, tzinfo=UTC), 1, (date(2026, 11, 20), date(2026, 11, 21))),
        (datetime(2026, 11, 20, 23, tzinfo=UTC), 2, (date(2026, 11, 20), date(2026, 11, 22))),
        (datetime(2026, 11, 20, tzinfo=UTC), 24, (date(2026, 11, 20), date(2026, 11, 21))),
        (NOON, 0, (date(2026, 11, 20), date(2026, 11, 21))),
    ],
    ids=["an hour", "the last hour", "over midnight", "a day", "no width"],
)
def test_a_run_by_hand_means_every_utc_day_that_its_interval_touches(
    start: datetime, hours: int, days: tuple[date, date], tmp_path: Path
) -> None:
    runs = [run_of("manual", start, hours=hours)] * 2
    assert fetched(tmp_path, runs) == [days, days]


def test_a_logical_date_given_on_the_command_line_is_the_day_meant(tmp_path: Path) -> None:
    run = run_of("manual", NOON)
    run.logical_date = datetime(2026, 10, 1, 7, tzinfo=UTC)
    assert fetched(tmp_path, [run]) == [(date(2026, 10, 1), date(2026, 10, 2))]


def test_a_backfill_fetches_each_day_once_however_many_hours_it_has(tmp_path: Path) -> None:
    hours = [run_of("backfill", NOON.replace(hour=0) + n * HOUR) for n in range(120)]

    first = fetched(tmp_path, hours)
    backwards = fetched(tmp_path, hours[::-1])  # the next backfill over the same days

    wanted = [(date(2026, 11, 20 + n), date(2026, 11, 21 + n)) for n in range(5)]
    assert [days for days in first if days] == wanted
    assert [days for days in backwards if days] == wanted[::-1]


def test_a_later_backfill_over_other_hours_of_a_day_fetches_it_again(tmp_path: Path) -> None:
    with time_machine.travel(NOON) as clock:
        assert fetched(tmp_path, [run_of("backfill", NOON - HOUR)])[0] is not None
        assert fetched(tmp_path, [run_of("backfill", NOON)])[0] is None
        clock.shift(2 * HOUR)
        assert fetched(tmp_path, [run_of("backfill", NOON + HOUR)])[0] is not None


def test_a_backfill_takes_one_snapshot_of_what_has_no_past(tmp_path: Path) -> None:
    days = [run_of("backfill", NOON + n * timedelta(days=1), hours=24) for n in range(5)]
    assert [one is not None for one in fetched(tmp_path, days, "prices")] == [True, *[False] * 4]
