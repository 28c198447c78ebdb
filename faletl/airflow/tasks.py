"""Tasks and task groups that the DAGs are put together from.

A resource takes the same way in every DAG:

    plan → (ask_ahead, mapped over batches of ids) → extract, mapped over windows → load → all_loaded

What passes between tasks is the path of a plan and which of its windows are meant; pages lie in the
landing folder, which all workers see. A window that fails does not stop the others: `load` takes what
has landed, and `all_loaded` fails the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, Param, TaskGroup, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from faletl.airflow.notifier import FalNotifier, announce
from faletl.airflow.plugin import POOL
from faletl.airflow.retry import FAILED, FalRetryPolicy
from faletl.airflow.timetable import FullHoursTimetable
from faletl.errors import DataRefusedError, FaletlError, KeyRefusedError, UsageError
from faletl.resources import RESOURCES, Resource

if TYPE_CHECKING:
    from faletl.config import Settings
    from faletl.line.distributed import Batch, Chunk
    from faletl.selection import Asked

log = logging.getLogger(__name__)

RAW = {
    name: Asset(f"faletl://warehouse/raw/{name}", group="faletl", extra={"table": resource.table})
    for name, resource in RESOURCES.items()
}
"""The raw tables; an event tells what was loaded into one, of which account and windows."""

MARTS = Asset("faletl://warehouse/marts", group="faletl")
REPORTS = Asset("faletl://warehouse/reports", group="faletl")
PUBLISHED = Asset("faletl://warehouse/published", group="faletl")
"""The copy that people and tools open; schedule your own DAGs on it."""

EVERY_HOUR = [
    name
    for name, resource in RESOURCES.items()
    if resource.ids_per_call is None and (resource.window == "day" or resource.every_run)
]
"""What a DAG reads by itself: usage, charges, the balance."""

EVERY_DAY = [
    name
    for name, resource in RESOURCES.items()
    if resource.window == "snapshot" and not resource.every_run
]
"""Snapshots, each in need of the one before: the catalogue, its prices."""

AFTER_USAGE = [
    name
    for name, resource in RESOURCES.items()
    if resource.window == "day" and resource.ids_per_call is not None
]
"""What is asked by the ids of endpoints that were used: analytics."""

HOURLY = FullHoursTimetable("6 * * * *", timezone="UTC")
"""When the hour that just ended can be read: 5 minutes after its end at the earliest.

Each interval is a full hour, so none touches two days.
"""

DAILY = FullHoursTimetable("10 0 * * *", timezone="UTC")
"""After the first hourly run of the day, which brings the last hour of the day before."""

WEEKLY = FullHoursTimetable("40 3 * * 0", timezone="UTC")
"""On Sundays, behind the daily runs and in front of the next hourly one."""

DAG_ARGS: dict[str, Any] = {
    "start_date": datetime(2026, 1, 1, tzinfo=UTC),
    "catchup": False,
    "max_active_runs": 1,
    "tags": ["fal", "spend"],
    "default_args": {
        "owner": os.environ.get("FALETL_OWNER") or "faletl",
        "retries": 5,
        "retry_delay": timedelta(minutes=1),
        "retry_exponential_backoff": 2,
        "max_retry_delay": timedelta(minutes=30),
        "retry_policy": FalRetryPolicy(),
        "execution_timeout": timedelta(hours=6),
        "on_failure_callback": FalNotifier(
            "{{ dag.dag_id }}, {{ ti.task_id }} failed: {{ exception or 'see its log' }}"
        ),
    },
}

AT_ONCE = 4
"""So many extracting tasks of a resource at a time: fal limits an account, not a worker."""

FIRST = 100
"""Build and publish go before loads that wait for the pool: in between would be something not built."""


def connections() -> list[str]:
    """The ids of the connections to fal, each of which has DAGs of its own (FALETL_CONNECTIONS)."""
    given = os.environ.get("FALETL_CONNECTIONS", "")
    return [name.strip() for name in given.split(",") if name.strip()] or ["fal_default"]


def dag_id(name: str, connection: str) -> str:
    """The DAG's name; with that of the connection where it is not `fal_default`."""
    return name if connection == "fal_default" else f"{name}__{connection.removeprefix('fal_')}"


# --- From fal to raw ------------------------------------------------------------------------------


def load_resource(name: str, connection: str, after: Sequence[Any] = ()) -> Any:
    """The tasks of one resource, as a task group of its name, `after` other loads; returns its load.

    It goes on whatever became of those: that they failed is for their `all_loaded` to say, which has to
    stay a last task of the DAG for that.
    """
    resource = RESOURCES[name]

    with TaskGroup(name, tooltip=resource.comment):
        planned: Any = plan(name, connection)
        for earlier in after:
            earlier >> planned
        extracting = extract.partial(connection=connection, name=name).expand(piece=planned)
        if resource.ids_per_call is not None:
            asking = ask_ahead.partial(connection=connection, name=name)
            asking.expand(batch=id_batches(planned)) >> extracting
        loaded: Any = load.override(outlets=[RAW[name]])(name, connection, planned)
        extracting >> loaded
        extracting >> all_loaded(loaded)
    return loaded


@task(trigger_rule="all_done")
def plan(name: str, connection: str) -> list[Chunk]:
    """Which windows are to be read: those that are due, or the days that the run stands for.

    Returns the path of the plan, which lies with the landed pages, cut into pieces.
    """
    from faletl.airflow.runs import asked
    from faletl.line import distributed

    context = get_current_context()
    with _settings(connection, RESOURCES[name]) as settings:
        form = context["params"]
        run = context["dag_run"]
        # Of the DAG, not of the run: any run may be given parameters of somebody's own, of any content.
        has_form = "resources" in context["dag"].params
        meant = _meant_by(form, name) if has_form else asked(settings, run, name)
        if meant is None:
            return []
        if has_form and form["dry_run"]:
            _tell_forecast(settings, meant)
            return []
        # Whoever tries a new DAG by hand would else get the hour before, and from there on.
        by_hand = not has_form and run.run_type == "manual"
        path = distributed.write_plan(settings, meant, is_first_due=by_hand)
        return distributed.chunks(path) if path else []


@task
def id_batches(planned: Sequence[Chunk]) -> list[Batch]:
    """The batches of endpoint ids to ask for, where a window asks for more than one call takes."""
    from faletl.line import distributed

    return distributed.batches(planned[0]["plan"]) if planned else []


@task(
    doc_md="Land what fal answers for a batch of endpoint ids, for `extract` to find.",
    max_active_tis_per_dagrun=AT_ONCE,
    map_index_template="{{ task.op_kwargs['batch']['ids'] }}",
)
def ask_ahead(batch: Batch, connection: str, name: str) -> int:
    """Land what fal answers for one batch of endpoint ids; returns 1 if it did.

    What fails is for `extract` to ask again, and to judge; but a refused key or a locked account ends it
    here.
    """
    from faletl.line import distributed

    with _settings(connection, RESOURCES[name]) as settings:
        try:
            return int(distributed.ask_batch(settings, batch))
        except FaletlError as error:
            if error.exit_code == KeyRefusedError.exit_code:
                raise
            log.warning("%s; extract asks again", error)
            return 0


@task(
    doc_md="Fetch windows, land their pages as fal sent them, prove them complete.",
    max_active_tis_per_dagrun=AT_ONCE,
    trigger_rule="none_failed",
    map_index_template="{{ task.op_kwargs['piece']['windows'] }}",
)
def extract(piece: Chunk, connection: str, name: str) -> list[str]:
    """Fetch the windows of a piece, land their pages as fal sent them, prove them complete.

    Returns the folders of what landed. A window of them that fails fails the task when the others are
    done; a retry takes what has landed as read. It fails with what no retry can help (a locked account),
    else with what one can, else with what is refused.
    """
    from faletl.line import distributed

    with _settings(connection, RESOURCES[name]) as settings:
        report = distributed.extract_chunk(settings, piece)
        for _, error in report.failures:
            log.error("%s", error)
        if report.failures:
            raise min((error for _, error in report.failures), key=_rank)
        return [str(outcome.path) for outcome in report.outcomes]


@task(pool=POOL, weight_rule="absolute", trigger_rule="all_done")
def load(name: str, connection: str, planned: Sequence[Chunk]) -> dict[str, int]:
    """Load what has landed, window by window, each exactly once; the only writer meanwhile.

    Returns counts of windows. Updates the asset of the raw table if that is news to the models; what is
    refused or held is announced and left for `all_loaded`.
    """
    from faletl.line import distributed
    from faletl.line.release import announce_alerts, is_news

    if not planned:
        raise AirflowSkipException("no window is to be read")
    with _settings(connection, RESOURCES[name]) as settings:
        report = distributed.load_plan(settings, planned[0]["plan"])
        announce_alerts(settings, announce)
        for _, error in report.failures:
            if error.exit_code == FAILED:
                raise error
            log.error("%s", error)
        counts = dict.fromkeys(("loaded", "unchanged", "superseded", "held"), 0)
        for outcome in report.outcomes:
            counts[outcome.outcome] += 1
        if not report.outcomes and not report.failures:
            raise AirflowSkipException("nothing has landed")
        if not report.failures and not is_news(settings, name):
            raise AirflowSkipException(f"nothing moved: {counts['unchanged']} windows are as they were")
        moved = [outcome for outcome in report.outcomes if outcome.outcome == "loaded"]
        get_current_context()["outlet_events"][RAW[name]].extra = {
            "account": report.account,
            "rows": sum(outcome.rows for outcome in moved),
            "windows": [str(outcome.window) for outcome in moved],
            **counts,
        }
        return {**counts, "refused": len(report.failures)}


@task(trigger_rule="none_failed", retries=0)
def all_loaded(counts: Mapping[str, int] | None) -> None:
    """Fail the run if a window was refused, or could not be extracted."""
    if counts and counts["refused"]:
        raise DataRefusedError(
            f"{counts['refused']} windows were not loaded; the log of load and faletl status say why"
        )


# --- From raw to readers --------------------------------------------------------------------------


@task(pool=POOL, priority_weight=FIRST, weight_rule="absolute", outlets=[MARTS, REPORTS])
def build(connection: str) -> int:
    """Build staging, marts and reports for the days that changed, and check them, in one transaction.

    Returns how many days. What fails a check is undone, and readers keep what they had.
    """
    from faletl import pipeline
    from faletl.line.release import announce_alerts

    context = get_current_context()
    for asset, events in context.get("triggering_asset_events", {}).items():
        for event in events:
            windows = ", ".join(event.extra.get("windows", []))
            log.info("%s moved: %s", asset.uri, windows or "as the event does not tell")
    with _settings(connection) as settings:
        built = pipeline.build(settings).build
        announce_alerts(settings, announce)
    if built is None:
        raise AirflowSkipException("nothing to build: nothing new is loaded")
    for asset in (MARTS, REPORTS):
        context["outlet_events"][asset].extra = {"days": built.days, "checks": built.checks}
    return built.days


@task(
    pool=POOL,
    priority_weight=FIRST,
    weight_rule="absolute",
    outlets=[PUBLISHED],
    trigger_rule="none_failed",
)
def publish(connection: str) -> str:
    """Show the newest build to readers in one step: returns what they open."""
    from faletl import pipeline
    from faletl.line.release import is_behind

    with _settings(connection) as settings:
        if is_behind(settings):
            raise AirflowSkipException("something was loaded meanwhile: the run it sets off shows both")
        published = pipeline.publish(settings).published
    if published is None:
        raise AirflowSkipException("nothing to publish: readers have the newest build")
    return published


@task(pool=POOL, weight_rule="absolute")
def maintain(connection: str) -> str | None:
    """Delete superseded landed pages, snapshots without news, old rows of ops, and leftovers.

    Returns what readers open, if there is a new build to see. How much was deleted is in the log.
    """
    from faletl.operations.maintain import maintain as maintained

    with _settings(connection) as settings:
        done = maintained(settings)
    for one in done.freed:
        log.info("deleted: %s, %d rows, %d files, %d bytes", one.kind, one.rows, one.files, one.bytes)
    return done.report.published


@task(outlets=[MARTS, REPORTS, PUBLISHED])
def shown(published: str | None) -> None:
    """Update the assets, if there is a new build to see."""
    if published is None:
        raise AirflowSkipException("nothing was built: the tables are as they were")


@task.sensor(mode="reschedule", poke_interval=600, timeout=timedelta(days=1).total_seconds())
def is_modelled(connection: str) -> bool:
    """Wait until readers can see the whole of the day that this run stands for."""
    from faletl.line.release import is_published

    start = get_current_context().get("data_interval_start")
    day = start.astimezone(UTC).date() if start else datetime.now(UTC).date() - timedelta(days=1)
    with _settings(connection) as settings:
        return is_published(settings, day)


# --- A backfill by hand ---------------------------------------------------------------------------


def backfill_params() -> dict[str, Param]:
    """The form of `fal_backfill`."""
    names = list(RESOURCES)
    return {
        "start": Param(
            None, type=["string", "null"], format="date", title="First day",
            description="UTC. Named days are fetched anew. Empty: what is due.",
        ),
        "end": Param(
            None, type=["string", "null"], format="date", title="Day after the last",
            description="UTC, exclusive. Empty: up to now.",
        ),
        "resources": Param(
            names, type="array", items={"type": "string", "enum": names}, examples=names,
            title="Resources", description="Which collections of fal's API.",
        ),
        "dry_run": Param(
            False, type="boolean", title="Dry run",
            description="Only tell, in the log of plan, which windows in how many calls.",
        ),
    }  # fmt: skip


def _meant_by(form: Mapping[str, Any], name: str) -> Asked:
    """What the form asks for, of one resource."""
    from faletl.selection import Asked
    from faletl.windows import day_of

    if name not in form["resources"]:
        raise AirflowSkipException(f"{name} is not among the resources that the form names")
    try:
        start, end = (day_of(day) if (day := form[key]) else None for key in ("start", "end"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Asked(start, end, [name])


# --- What tasks have in common --------------------------------------------------------------------


def _rank(error: FaletlError) -> tuple[bool, int]:
    """Which of several errors a task ends with, the lowest first: it decides on the retry."""
    return error.exit_code != KeyRefusedError.exit_code, error.exit_code


@contextmanager
def _settings(connection: str, resource: Resource | None = None) -> Iterator[Settings]:
    """Settings from the connection; a refused key fails the task with the sentence of `faletl check`.

    What an account may go without (analytics) is left out where its key is fine but may not read it.
    An error that knows more than that fal refused the key (a locked account) is raised as it is.
    """
    from faletl.airflow.hook import FalHook
    from faletl.operations.check import check

    settings = FalHook(connection).settings()
    try:
        yield settings
    except KeyRefusedError as error:
        if type(error) is not KeyRefusedError:
            raise
        checked = check(settings)
        mine = [one.sentence for one in checked.findings if resource and one.resource == resource.name]
        sentence = checked.why_refused or next(iter(mine), "") or error.message
        if resource is not None and resource.is_optional and not checked.why_refused:
            raise AirflowSkipException(sentence) from None
        raise KeyRefusedError(sentence, **error.facts) from None


def _tell_forecast(settings: Settings, asked: Asked) -> None:
    from faletl import pipeline

    for one in pipeline.dry_run(settings, asked):
        first, last = one.windows[0], one.windows[-1]
        about = "perhaps" if one.is_guess else "about"
        log.info(
            "%s: %d windows, %s to %s, in %s %d calls",
            one.resource, len(one.windows), first, last, about, one.calls,
        )  # fmt: skip
