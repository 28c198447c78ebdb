"""Tasks and task groups of the DAGs.

Every DAG processes a resource in the same way:

    plan → (ask_ahead, mapped over batches of ids) → extract, mapped over windows → load → all_loaded

Tasks pass on only the path of a plan and the windows to process; pages are in the landing folder, which
all workers share. A window that fails does not stop the others: `load` loads what has landed, and
`all_loaded` fails the run.
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
"""The raw tables; an asset event has the account, windows and row count that were loaded."""

MARTS = Asset("faletl://warehouse/marts", group="faletl")
REPORTS = Asset("faletl://warehouse/reports", group="faletl")
PUBLISHED = Asset("faletl://warehouse/published", group="faletl")
"""The copy that people and tools open; schedule your own DAGs on it."""

EVERY_HOUR = [
    name
    for name, resource in RESOURCES.items()
    if resource.ids_per_call is None and (resource.window == "day" or resource.every_run)
]
"""Resources that are fetched without other resources: usage, charges, the balance."""

EVERY_DAY = [
    name
    for name, resource in RESOURCES.items()
    if resource.window == "snapshot" and not resource.every_run
]
"""Snapshots, each of which needs the one before: the catalogue, then its prices."""

AFTER_USAGE = [
    name
    for name, resource in RESOURCES.items()
    if resource.window == "day" and resource.ids_per_call is not None
]
"""Resources that are requested by the ids of used endpoints: analytics."""

HOURLY = FullHoursTimetable("6 * * * *", timezone="UTC")
"""Hourly, when the hour that ended can be fetched: at the earliest 5 minutes after its end.

Each interval is a full hour, so none touches two days.
"""

DAILY = FullHoursTimetable("10 0 * * *", timezone="UTC")
"""Daily, after the first hourly run, which fetches the last hour of the day before."""

WEEKLY = FullHoursTimetable("40 3 * * 0", timezone="UTC")
"""On Sundays, after the daily runs and before the next hourly one."""

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
"""Maximum number of concurrent extract tasks per resource: fal limits accounts, not workers."""

FIRST = 100
"""Priority of build and publish over waiting loads: a build is published before the next load."""


def connections() -> list[str]:
    """Return the ids of the connections to fal; each has its own DAGs (FALETL_CONNECTIONS)."""
    names = os.environ.get("FALETL_CONNECTIONS", "")
    return [name.strip() for name in names.split(",") if name.strip()] or ["fal_default"]


def dag_id(name: str, connection: str) -> str:
    """Return the name of the DAG, with that of the connection unless it is `fal_default`."""
    return name if connection == "fal_default" else f"{name}__{connection.removeprefix('fal_')}"


# --- From fal to raw ------------------------------------------------------------------------------


def load_resource(name: str, connection: str, after: Sequence[Any] = ()) -> Any:
    """Make the task group of one resource, to run `after` other loads; return its load task.

    It runs even if the other loads failed: their `all_loaded` tasks report that, and must stay last
    tasks of the DAG to fail the run.
    """
    resource = RESOURCES[name]

    with TaskGroup(name, tooltip=resource.comment):
        planned: Any = plan(name, connection)
        for earlier in after:
            earlier >> planned
        extracting = extract.partial(connection=connection, name=name).expand(chunk=planned)
        if resource.ids_per_call is not None:
            asking = ask_ahead.partial(connection=connection, name=name)
            asking.expand(batch=id_batches(planned)) >> extracting
        loaded: Any = load.override(outlets=[RAW[name]])(name, connection, planned)
        extracting >> loaded
        extracting >> all_loaded(loaded)
    return loaded


@task(trigger_rule="all_done")
def plan(name: str, connection: str) -> list[Chunk]:
    """Plan the windows to fetch: those that are due, or the days of the run's interval.

    Returns the path of the plan, which is stored with the landed pages, cut into chunks.
    """
    from faletl.airflow.runs import selection_of
    from faletl.line import distributed

    context = get_current_context()
    with _settings(connection, RESOURCES[name]) as settings:
        form = context["params"]
        run = context["dag_run"]
        # Check the DAG, not the run: a user may pass any parameters to any run.
        has_form = "resources" in context["dag"].params
        selection = _selection_of_form(form, name) if has_form else selection_of(settings, run, name)
        if selection is None:
            return []
        if has_form and form["dry_run"]:
            _log_forecast(settings, selection)
            return []
        # Otherwise the first manual run of a new DAG would start the history at the hour before.
        is_manual = not has_form and run.run_type == "manual"
        path = distributed.write_plan(settings, selection, is_first_due=is_manual)
        return distributed.chunks(path) if path else []


@task
def id_batches(planned: Sequence[Chunk]) -> list[Batch]:
    """Return batches of endpoint ids, if a window needs more ids than one call accepts."""
    from faletl.line import distributed

    return distributed.batches(planned[0]["plan"]) if planned else []


@task(
    doc_md="Land fal's answer for a batch of endpoint ids, which `extract` uses.",
    max_active_tis_per_dagrun=AT_ONCE,
    map_index_template="{{ task.op_kwargs['batch']['ids'] }}",
)
def ask_ahead(batch: Batch, connection: str, name: str) -> int:
    """Land fal's answer for one batch of endpoint ids; return 1 on success.

    After a failure `extract` makes the call again and handles its errors, but a refused key or a locked
    account fails this task.
    """
    from faletl.line import distributed

    with _settings(connection, RESOURCES[name]) as settings:
        try:
            return int(distributed.ask_batch(settings, batch))
        except FaletlError as error:
            if error.exit_code == KeyRefusedError.exit_code:
                raise
            log.warning("%s; extract will make this call again", error)
            return 0


@task(
    doc_md="Fetch windows, land their pages as fal sent them, prove them complete.",
    max_active_tis_per_dagrun=AT_ONCE,
    trigger_rule="none_failed",
    map_index_template="{{ task.op_kwargs['chunk']['windows'] }}",
)
def extract(chunk: Chunk, connection: str, name: str) -> list[str]:
    """Fetch the windows of a chunk, land their pages as fal sent them, prove them complete.

    Returns the folders of the extracts. If a window fails, the task fails after the others are done; a
    retry does not fetch landed windows again. The task fails with an error that no retry can help (a
    locked account) if there is one, else with one that a retry can help, else with refused data.
    """
    from faletl.line import distributed

    with _settings(connection, RESOURCES[name]) as settings:
        report = distributed.extract_chunk(settings, chunk)
        for _, error in report.failures:
            log.error("%s", error)
        if report.failures:
            raise min((error for _, error in report.failures), key=_rank)
        return [str(outcome.path) for outcome in report.outcomes]


@task(pool=POOL, weight_rule="absolute", trigger_rule="all_done")
def load(name: str, connection: str, planned: Sequence[Chunk]) -> dict[str, int]:
    """Load what has landed, window by window, each exactly once, as the only writer.

    Returns counts of windows. Updates the asset of the raw table if models need a build. Refused and
    held windows are announced, and `all_loaded` fails for refused ones.
    """
    from faletl.line import distributed
    from faletl.line.release import announce_alerts, is_news

    if not planned:
        raise AirflowSkipException("no window is planned")
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
            raise AirflowSkipException(f"nothing changed in {counts['unchanged']} windows")
        loaded = [outcome for outcome in report.outcomes if outcome.outcome == "loaded"]
        get_current_context()["outlet_events"][RAW[name]].extra = {
            "account": report.account,
            "rows": sum(outcome.rows for outcome in loaded),
            "windows": [str(outcome.window) for outcome in loaded],
            **counts,
        }
        return {**counts, "refused": len(report.failures)}


@task(trigger_rule="none_failed", retries=0)
def all_loaded(counts: Mapping[str, int] | None) -> None:
    """Fail the run if a window was refused, or could not be extracted."""
    if counts and counts["refused"]:
        raise DataRefusedError(
            f"{counts['refused']} windows were not loaded; see the log of load, or faletl status"
        )


# --- From raw to readers --------------------------------------------------------------------------


@task(pool=POOL, priority_weight=FIRST, weight_rule="absolute", outlets=[MARTS, REPORTS])
def build(connection: str) -> int:
    """Build staging, marts and reports for the days that changed, and check them, in one transaction.

    Returns the number of days. If a check fails, the build is undone, and readers keep the last one.
    """
    from faletl import pipeline
    from faletl.line.release import announce_alerts

    context = get_current_context()
    for asset, events in context.get("triggering_asset_events", {}).items():
        for event in events:
            windows = ", ".join(event.extra.get("windows", []))
            log.info("%s changed: %s", asset.uri, windows or "the event names no windows")
    with _settings(connection) as settings:
        built = pipeline.build(settings).build
        announce_alerts(settings, announce)
    if built is None:
        raise AirflowSkipException("nothing to build: no new rows are loaded")
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
    """Show readers the newest build, in one step; return what they open."""
    from faletl import pipeline
    from faletl.line.release import is_behind

    with _settings(connection) as settings:
        if is_behind(settings):
            raise AirflowSkipException(
                "newer rows were loaded meanwhile; the run that they trigger publishes both"
            )
        published = pipeline.publish(settings).published
    if published is None:
        raise AirflowSkipException("nothing to publish: readers have the newest build")
    return published


@task(pool=POOL, weight_rule="absolute")
def maintain(connection: str) -> str | None:
    """Delete superseded landed pages, snapshots that changed nothing, old ops rows, and leftovers.

    Returns what readers open if there is a new build, else None. The log has the deleted amounts.
    """
    from faletl.operations.maintain import maintain as run_maintenance

    with _settings(connection) as settings:
        maintenance = run_maintenance(settings)
    for deleted in maintenance.freed:
        log.info(
            "deleted: %s, %d rows, %d files, %d bytes",
            deleted.kind,
            deleted.rows,
            deleted.files,
            deleted.bytes,
        )
    return maintenance.report.published


@task(outlets=[MARTS, REPORTS, PUBLISHED])
def shown(published: str | None) -> None:
    """Update the assets if a new build was published."""
    if published is None:
        raise AirflowSkipException("nothing was built: the tables are unchanged")


@task.sensor(mode="reschedule", poke_interval=600, timeout=timedelta(days=1).total_seconds())
def is_modelled(connection: str) -> bool:
    """Wait until readers see the whole day of this run's interval."""
    from faletl.line.release import is_published

    start = get_current_context().get("data_interval_start")
    day = start.astimezone(UTC).date() if start else datetime.now(UTC).date() - timedelta(days=1)
    with _settings(connection) as settings:
        return is_published(settings, day)


# --- A backfill by hand ---------------------------------------------------------------------------


def backfill_params() -> dict[str, Param]:
    """Return the form fields of `fal_backfill`."""
    names = list(RESOURCES)
    return {
        "start": Param(
            None, type=["string", "null"], format="date", title="First day",
            description="UTC. Days you name are fetched again. Empty: what is due.",
        ),
        "end": Param(
            None, type=["string", "null"], format="date", title="Day after the last",
            description="UTC, exclusive. Empty: up to now.",
        ),
        "resources": Param(
            names, type="array", items={"type": "string", "enum": names}, examples=names,
            title="Resources", description="The collections of fal's API to fetch.",
        ),
        "dry_run": Param(
            False, type="boolean", title="Dry run",
            description="Only write the windows and the number of calls to the log of plan.",
        ),
    }  # fmt: skip


def _selection_of_form(form: Mapping[str, Any], name: str) -> Asked:
    """Return the selection of the form for one resource."""
    from faletl.selection import Asked
    from faletl.windows import day_of

    if name not in form["resources"]:
        raise AirflowSkipException(f"{name} is not selected in the form")
    try:
        start, end = (day_of(day) if (day := form[key]) else None for key in ("start", "end"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Asked(start, end, [name])


# --- Shared by tasks ------------------------------------------------------------------------------


def _rank(error: FaletlError) -> tuple[bool, int]:
    """Sort key of several errors: the task fails with the lowest, which decides on the retry."""
    return error.exit_code != KeyRefusedError.exit_code, error.exit_code


@contextmanager
def _settings(connection: str, resource: Resource | None = None) -> Iterator[Settings]:
    """Settings from the connection; a refused key fails the task with the sentence of `faletl check`.

    An optional resource (analytics) is skipped if the key is valid but may not read it. A more specific
    error, such as a locked account, is raised unchanged.
    """
    from faletl.airflow.hook import FalHook
    from faletl.operations.check import check

    settings = FalHook(connection).settings()
    try:
        yield settings
    except KeyRefusedError as error:
        if type(error) is not KeyRefusedError:
            raise
        report = check(settings)
        sentences = [
            access.sentence
            for access in report.findings
            if resource and access.resource == resource.name
        ]
        sentence = report.why_refused or next(iter(sentences), "") or error.message
        if resource is not None and resource.is_optional and not report.why_refused:
            raise AirflowSkipException(sentence) from None
        raise KeyRefusedError(sentence, **error.facts) from None


def _log_forecast(settings: Settings, selection: Asked) -> None:
    from faletl import pipeline

    for forecast in pipeline.dry_run(settings, selection):
        first, last = forecast.windows[0], forecast.windows[-1]
        about = "perhaps" if forecast.is_guess else "about"
        log.info(
            "%s: %d windows, %s to %s, in %s %d calls",
            forecast.resource, len(forecast.windows), first, last, about, forecast.calls,
        )  # fmt: skip
