"""The steps of a run as functions: the public API for command line, schedulers and scripts.

    extract (fetch, land, stage, prove) → load → build → publish

Each step can run again at any time and ends in the same state. A window that fails does not stop the
others: all that can be done is done, and the report lists the failures.
"""

from __future__ import annotations

from datetime import UTC, datetime

from faletl.config import Settings
from faletl.errors import FaletlError
from faletl.fal.client import FalClient
from faletl.line import accounts
from faletl.line.extract import extract_all
from faletl.line.load import load_extracts, loader, not_loaded, record_failures
from faletl.line.plan import Forecast, forecast
from faletl.line.release import build_and_publish
from faletl.line.report import Progress, Report, new_run_id, no_progress, result_of
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.staging.window import Staged
from faletl.warehouse import open_warehouse


def run(settings: Settings, asked: Asked = EVERYTHING_DUE, progress: Progress = no_progress) -> Report:
    """Run the whole line, for what is due or for the UTC days that `asked` names.

    Named days are always fetched again; without an end they go up to now. One snapshot of models, prices
    and credits is extracted, as of now. Errors of single windows are in the report, not raised.

    Raises:
        UsageError: the settings are not valid; there is no key.
    """
    report = Report(new_run_id())
    warehouse = open_warehouse(settings)
    with loader(settings, warehouse, report) as load:
        can_write = extract_all(settings, warehouse, report, load, asked, progress)
    if can_write:
        record_failures(settings, report)
        try:
            build_and_publish(settings, report)
        except FaletlError as error:
            report.failures.append((None, error))
    return report


def extract(
    settings: Settings, asked: Asked = EVERYTHING_DUE, progress: Progress = no_progress
) -> Report:
    """Land and prove the windows that `run` would load; load nothing. Raises UsageError, as `run`."""
    report = Report(new_run_id())

    def record(batch: list[Staged]) -> None:
        report.outcomes.extend(result_of(staged, "landed") for staged in batch)

    extract_all(settings, open_warehouse(settings), report, record, asked, progress)
    return report


def dry_run(settings: Settings, asked: Asked = EVERYTHING_DUE) -> list[Forecast]:
    """Return what `run` would extract now. Asks fal at most for the account's name, and writes nothing.

    Raises:
        UsageError: the settings are not valid; there is no key.
        ApiUnavailableError, ContractError: fal did not name the account of the key.
    """
    settings.require_key()
    warehouse = open_warehouse(settings)
    with FalClient(settings) as client:
        account = accounts.preview(client, settings, warehouse)
    with warehouse.reading() as connection:
        return forecast(
            settings, connection, account.label, asked, datetime.now(UTC), owners=account.owners
        )


def load(settings: Settings, asked: Asked = EVERYTHING_DUE, progress: Progress = no_progress) -> Report:
    """Stage, prove and load what has landed and is not loaded yet; sends no request to fal."""
    report = Report(new_run_id())
    load_waiting(settings, asked, report, progress)
    return report


def load_waiting(
    settings: Settings, asked: Asked, report: Report, progress: Progress = no_progress
) -> None:
    """Load as `load` does, and add the result of each window to the report."""
    waiting = [
        landed
        for landed in not_loaded(settings, open_warehouse(settings), report)
        if asked.includes(landed.manifest.resource, landed.manifest.window)
    ]
    load_extracts(settings, waiting, report, progress)


def build(settings: Settings, *, full: bool = False) -> Report:
    """Build marts and reports if raw, the SQL or the seeds changed (`full`: in any case).

    Raises:
        CheckFailedError: a SQL check found rows; nothing was changed.
    """
    report = Report(new_run_id())
    build_and_publish(settings, report, builds="always" if full else "behind", publishes=False)
    return report


def publish(settings: Settings) -> Report:
    """Show the newest build to readers, if they do not have it yet.

    Raises:
        WarehouseError: something was loaded that is not built yet.
    """
    report = Report(new_run_id())
    build_and_publish(settings, report, builds="never")
    return report
