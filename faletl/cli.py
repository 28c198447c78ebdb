"""The `faletl` command: a thin skin on `faletl.pipeline`.

Results go to stdout, progress and sentences to stderr, the designed exit code to the shell. Nothing
heavy is imported before a command needs it: `faletl --help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from resource import RLIMIT_CORE, getrlimit, setrlimit
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from typer.exceptions import TyperException

from faletl import __version__
from faletl.errors import (
    DamagedExtractError,
    ExhaustedError,
    FaletlError,
    StorageError,
    UsageError,
)
from faletl.resources import RESOURCES
from faletl.windows import day_of

if TYPE_CHECKING:
    from faletl.pipeline import Progress, Report
    from faletl.plan import Task

app = typer.Typer(
    name="faletl",
    help="Know what you spend on fal.ai: extract, prove, load and model what fal's APIs tell.",
    epilog="Settings are environment variables; the first is FAL_KEY. Exit codes: 0 done, 1 failed "
    "and may be tried again, 2 wrong use, settings or key, 3 refused by a check, 4 changed behind our "
    "back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


landing_app = typer.Typer(
    help="Landed pages: how much they take, dropping those that nothing stands on, scrubbing one.",
    epilog="Example: faletl landing du",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(landing_app, name="landing")

quarantine_app = typer.Typer(
    help="Rows that broke their contract: look at them, and replay them from the landed pages.",
    epilog="Example: faletl quarantine list",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(quarantine_app, name="quarantine")

accounts_app = typer.Typer(
    help="Accounts: list them, rename one, or forget one, which takes all of it out of the tables.",
    epilog="Example: faletl accounts rename acme acme-emea",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(accounts_app, name="accounts")


class _Stopped(BaseException):
    """Ctrl-C, or a request to terminate."""


class _Options:
    """What the options before the command say."""

    debug = False
    log_format = "text"


def _day(text: str) -> date:
    try:
        return day_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _resource(name: str) -> str:
    if name not in RESOURCES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(RESOURCES)}")
    return name


Start = Annotated[
    date | None,
    typer.Option(parser=_day, metavar="DATE", help="First UTC day. Named days are fetched again."),
]
End = Annotated[
    date | None,
    typer.Option(parser=_day, metavar="DATE", help="Day after the last, exclusive. Default: up to now."),
]
Resources = Annotated[
    list[str] | None,
    typer.Option(
        "--resource",
        parser=_resource,
        metavar="NAME",
        help=f"Only this one: {', '.join(RESOURCES)}. Repeatable.",
    ),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks and every step.")] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="How to write what goes to stderr.")
    ] = "text",
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version.",
            callback=lambda on: _version_of(on),
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Remember what holds for every command."""
    from faletl.config import unknown_variables

    _Options.debug, _Options.log_format = debug, log_format
    _set_up_logging()
    for name, meant in unknown_variables().items():
        logging.getLogger("faletl").warning(
            "%s is no setting of faletl%s", name, f"; is {meant} meant?" if meant else ""
        )


@app.command(epilog="Example: FAL_KEY=id:secret faletl run --start 2026-11-01 --end 2026-11-08")
def run(
    start: Start = None,
    end: End = None,
    resource: Resources = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell which windows, in how many calls and minutes.")
    ] = False,
) -> None:
    """The whole line: extract, prove, load, build and publish what is due, or the days given."""
    from faletl import answers, pipeline
    from faletl.config import Settings
    from faletl.plan import Asked

    if dry_run:
        settings = Settings.load()
        forecasts = pipeline.dry_run(settings, Asked(start, end, resource or ()))
        answers.print_forecasts(settings, forecasts)
        return
    with _progress() as progress:
        report = pipeline.run(Settings.load(), Asked(start, end, resource or ()), progress)
    _finish(report)


@app.command(epilog="Example: faletl extract --start 2026-11-01 --resource usage")
def extract(start: Start = None, end: End = None, resource: Resources = None) -> None:
    """Land and prove pages of what is due, or of the days given; load nothing."""
    from faletl import pipeline
    from faletl.config import Settings
    from faletl.plan import Asked

    with _progress() as progress:
        report = pipeline.extract(Settings.load(), Asked(start, end, resource or ()), progress)
    _finish(report)


@app.command(epilog="Example: faletl load --resource usage")
def load(start: Start = None, end: End = None, resource: Resources = None) -> None:
    """Load what has landed and is not loaded yet; asks fal nothing."""
    from faletl import pipeline
    from faletl.config import Settings
    from faletl.plan import Asked

    with _progress() as progress:
        report = pipeline.load(Settings.load(), Asked(start, end, resource or ()), progress)
    _finish(report, nothing="nothing to load: all that has landed is loaded")


@app.command(epilog="Example: faletl build --full")
def build(
    full: Annotated[bool, typer.Option("--full", help="Even if nothing changed.")] = False,
) -> None:
    """Build marts and reports from what is loaded, and check them."""
    from faletl import pipeline
    from faletl.config import Settings

    _finish(
        pipeline.build(Settings.load(), full=full), nothing="nothing to build: nothing new is loaded"
    )


@app.command(epilog="Example: faletl publish")
def publish() -> None:
    """Show the newest build to readers, in one step."""
    from faletl import pipeline
    from faletl.config import Settings

    _finish(pipeline.publish(Settings.load()), nothing="nothing to publish: no newer build is there")


@app.command(epilog="Example: faletl rebuild --window 2026-11-01")
def rebuild(
    window: Annotated[
        date | None,
        typer.Option(parser=_day, metavar="DATE", help="Only this UTC day. Default: everything."),
    ] = None,
) -> None:
    """Make the warehouse anew from the landed pages alone; asks fal nothing."""
    from faletl.config import Settings
    from faletl.rebuild import rebuild as rebuild_warehouse

    with _progress() as progress:
        report = rebuild_warehouse(Settings.load(), window, progress)
    _finish(report, nothing="nothing to rebuild: nothing was ever loaded from landed pages")


@app.command(epilog="Example: faletl verify")
def verify() -> None:
    """Look whether loaded rows, their landed pages, sums and models are as they were left."""
    from faletl.config import Settings
    from faletl.errors import TamperedError
    from faletl.verify import verify as verdict_on

    verdict = verdict_on(Settings.load())
    for sentence in verdict.findings:
        _say(sentence)
    if not verdict.is_complete:
        _say("sums and models were not looked at: something is not built yet; run faletl build")
    if verdict.findings:
        raise typer.Exit(TamperedError.exit_code)
    more = ", sums and models" if verdict.is_complete else ""
    typer.echo(f"all that was looked at is as it was left: ledger, rows, landed pages{more}")


@app.command(epilog="Example: faletl validate --resource usage --start 2026-11-01 --docs validation")
def validate(
    start: Start = None,
    end: End = None,
    resource: Resources = None,
    docs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write what was found as pages for a browser."),
    ] = None,
) -> None:
    """The gate once more, over what is loaded: all of it, or the days and resources given."""
    from faletl import answers
    from faletl.config import Settings
    from faletl.plan import Asked
    from faletl.validate import validate as verdict_on

    with _progress() as progress:
        verdict = verdict_on(Settings.load(), Asked(start, end, resource or ()), progress)
    answers.print_validations(verdict)
    if docs is not None:
        from faletl.validation_docs import write_docs

        typer.echo(f"wrote {write_docs(docs, verdict)}")
    raise typer.Exit(verdict.exit_code)


@app.command(epilog="Example: faletl stage --out handover --start 2026-11-01 --resource usage")
def stage(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")],
    start: Start = None,
    end: End = None,
    resource: Resources = None,
) -> None:
    """Loaded days as typed Parquet, a file each, for another engine; only what is new since."""
    from faletl.config import Settings
    from faletl.handover import hand_over
    from faletl.plan import Asked

    with _progress() as progress:
        handed = hand_over(Settings.load(), out, Asked(start, end, resource or ()), progress)
    typer.echo(
        f"{out}: {len(handed.written):,} files written, {handed.unchanged:,} there already, "
        f"{len(handed.deleted):,} deleted"
    )


@app.command(epilog="Example: faletl grant --reader analysts")
def grant(
    reader: Annotated[str, typer.Option(metavar="ROLE", help="A role of the database.")],
) -> None:
    """Let a role of a server warehouse read marts and reports, and nothing else."""
    from faletl.config import Settings
    from faletl.warehouse import open_warehouse

    open_warehouse(Settings.load()).grant(reader)
    typer.echo(f"{reader} reads marts and reports now, and after every build")


@app.command(epilog='Example: faletl accept usage 2026-11-20 --reason "fal confirmed it in ticket 4711"')
def accept(
    resource: Annotated[
        str, typer.Argument(parser=_resource, metavar="RESOURCE", help=f"One of {', '.join(RESOURCES)}.")
    ],
    day: Annotated[date, typer.Argument(parser=_day, metavar="DAY", help="The UTC day.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in ops.acceptances.")],
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Account label, where several have such a day.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Confirm what is loaded instead of the held extract.")
    ] = False,
) -> None:
    """Load a held extract, or a day that a contract rule refused; --keep confirms what is loaded."""
    from faletl.accept import accept as accepted
    from faletl.config import Settings

    _finish(accepted(Settings.load(), resource, day, reason=reason, account=account, is_kept=keep))


@quarantine_app.command("list", epilog="Example: faletl quarantine list --all")
def list_quarantine(
    with_resolved: Annotated[
        bool, typer.Option("--all", help="Also rows whose window was loaded since.")
    ] = False,
) -> None:
    """The rows set aside: where each stands, and what is wrong with it."""
    from faletl import answers
    from faletl.config import Settings
    from faletl.quarantine import rows_set_aside

    answers.print_quarantine(rows_set_aside(Settings.load(), is_open=not with_resolved))


@quarantine_app.command(epilog="Example: faletl quarantine show 20261123T103000000000Z-a1b2c3")
def show(
    load_id: Annotated[str, typer.Argument(metavar="LOAD_ID", help="A read, from the list.")],
) -> None:
    """The rows of one read as fal sent them, with the page where each was landed."""
    from faletl import answers
    from faletl.config import Settings
    from faletl.quarantine import rows_set_aside

    answers.print_rows_set_aside(rows_set_aside(Settings.load(), load_id))


@quarantine_app.command(epilog="Example: faletl quarantine retry")
def retry(
    load_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[LOAD_ID…]", help="Only these reads.")
    ] = None,
) -> None:
    """Take the pages of open rows through the line once more, after an upgrade; asks fal nothing."""
    from faletl.config import Settings
    from faletl.quarantine import retry as retried

    with _progress() as progress:
        report = retried(Settings.load(), load_ids or (), progress)
    _finish(report, nothing="nothing to retry: no row is set aside")


@accounts_app.callback()
def accounts(context: typer.Context) -> None:
    """List the accounts where nothing else is asked for."""
    if context.invoked_subcommand is None:
        list_accounts()


@accounts_app.command("list", epilog="Example: faletl accounts list")
def list_accounts() -> None:
    """Each account: its label, fal's usernames of it, how many keys were seen, and what is loaded."""
    from faletl import answers
    from faletl.config import Settings

    answers.print_accounts(Settings.load())


@accounts_app.command("rename", epilog="Example: faletl accounts rename acme acme-emea")
def rename_account(
    old: Annotated[str, typer.Argument(metavar="OLD", help="Its label, from the list.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new label, which no account has.")],
) -> None:
    """Rename an account in all tables, also for a later rebuild; then build and publish."""
    from faletl.config import Settings
    from faletl.rename import rename

    report = rename(Settings.load(), old, new)
    typer.echo(f"account {old} is now {new}; say so in FALETL_ACCOUNT and FALETL_OWNERS, where set")
    _finish(report)


@accounts_app.command("forget", epilog="Example: faletl accounts forget trial --yes")
def forget_account(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its label, from the list.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Do it; without it, only say what would go.")
    ] = False,
) -> None:
    """Delete all of an account from the tables, also for a later rebuild; then build and publish.

    Its landed pages stay until faletl landing prune, and are not loaded again.
    """
    from faletl.config import Settings
    from faletl.rename import extent, forget

    settings = Settings.load()
    found = extent(settings, name)
    told = f"{found.rows:,} rows of {found.days:,} days"
    if found.days:
        told += f", {found.first_day} to {found.last_day}"
    if not yes:
        raise UsageError(f"this would delete account {name!a}: {told}; if you mean it, add --yes")
    report = forget(settings, name)
    typer.echo(f"account {name} is forgotten: {told} deleted")
    _finish(report)


@app.command(epilog="Example: faletl horizon --set 2026-01-01 --resource usage")
def horizon(
    set_: Annotated[
        date | None,
        typer.Option("--set", parser=_day, metavar="DATE", help="Load days from this one on."),
    ] = None,
    resource: Resources = None,
    account: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Whose; by default that of FALETL_ACCOUNT or FAL_KEY."),
    ] = None,
) -> None:
    """The first UTC day that runs keep complete, per account and resource; --set moves it.

    Moved back, the days in between are due. Moved on, nothing is deleted, and loaded days before it are
    not extracted again.
    """
    from faletl import answers
    from faletl.config import Settings

    settings = Settings.load()
    if set_ is not None:
        from faletl.accounts import set_horizon

        set_horizon(settings, set_, resource or (), account)
    answers.print_horizons(settings, resource or (), account)


@landing_app.command(epilog="Example: faletl landing du")
def du() -> None:
    """How much the landed pages take, per resource, and how much of it prune would free."""
    from faletl import answers
    from faletl.config import Settings

    answers.print_landing(Settings.load())


@landing_app.command(epilog="Example: faletl landing prune --dry-run")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, only tell.")] = False,
) -> None:
    """Delete landed pages that nothing depends on, however young; rebuild gives the same as before.

    faletl maintain does it with those older than FALETL_KEEP_DAYS, and deletes what else is over.
    """
    from faletl.config import Settings
    from faletl.rebuild import prune as prune_landing

    reads, size = prune_landing(Settings.load(), is_dry=dry_run)
    typer.echo(f"{len(reads):,} reads, {size:,} bytes {'would be ' * dry_run}deleted")


@landing_app.command(
    epilog="Example: faletl landing scrub landing/acme/usage/…/….json.zst --out page.json"
)
def scrub(
    page: Annotated[
        str, typer.Argument(metavar="PAGE", help="A page of the landing folder, or a file of JSON.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new file for it; by default stdout.")
    ] = None,
    keep_amounts: Annotated[
        bool, typer.Option("--keep-amounts", help="Keep amounts, quantities, counts and durations.")
    ] = False,
) -> None:
    """Replace names, ids, texts and amounts of a page, so that it can be published in an issue.

    Names of fields, times, fal-ai/… endpoint ids, known units, currencies and the number of rows stay
    readable, and of each number its length, sign and zeros. The same text gets the same stand-in.
    """
    from faletl.scrub import READABLE, read_page, scrubbed, write_page

    clean = scrubbed(read_page(page), keep_amounts=keep_amounts)
    if out is None:
        typer.echo(clean)
    else:
        write_page(clean, out)
    _say(READABLE + "; all amounts, too" * keep_amounts + ": look at the page before you publish it")


@app.command(epilog="Example: faletl maintain --dry-run")
def maintain(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Delete nothing, only show what would go.")
    ] = False,
) -> None:
    """Delete what FALETL_KEEP_DAYS and FALETL_KEEP_OPS_DAYS let go; then build and publish.

    These are superseded landed pages, snapshots that say what the one before said, rows about runs that
    are over, and what killed commands left. Reports and faletl rebuild give the same as before.
    """
    from faletl import answers
    from faletl.config import Settings
    from faletl.maintain import maintain as maintained

    done = maintained(Settings.load(), is_dry=dry_run)
    answers.print_freed(done.freed, is_dry=dry_run)
    if not dry_run:
        _finish(done.report, nothing="nothing to build: the tables are as they were")


@app.command(epilog="Example: faletl status --json")
def status(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Per resource: newest window, lag, rows, open failures; the last build and publication."""
    from faletl import answers
    from faletl.config import Settings

    answers.print_status(Settings.load(), as_json=as_json)


@app.command(epilog="Example: FAL_KEY=id:secret faletl check")
def check() -> None:
    """Whether the key can read each resource, and what to do if not; a few tiny questions to fal."""
    from faletl import answers
    from faletl.check import check as checked_by
    from faletl.config import Settings

    if not _Options.debug:  # what is told below says it better than the client's log
        logging.getLogger("faletl.client").setLevel(logging.ERROR)
    settings = Settings.load()
    checked = checked_by(settings)
    answers.print_check(settings, checked)
    for problem in checked.problems:
        _say(problem.sentence)
    raise typer.Exit(checked.exit_code)


@app.command(epilog="Example: FAL_KEY=id:secret faletl estimate fal-ai/flux/dev=1000 --calls")
def estimate(
    plans: Annotated[
        list[str], typer.Argument(metavar="ENDPOINT=QUANTITY…", help="How many units of which endpoint.")
    ],
    calls: Annotated[bool, typer.Option("--calls", help="Quantities are calls, not units.")] = False,
) -> None:
    """What fal says that units or calls would cost, beside what was really charged for them of late."""
    from faletl import answers
    from faletl.config import Settings
    from faletl.estimate import estimate as estimated
    from faletl.estimate import planned

    planned_ones = [planned(text, by_calls=calls) for text in plans]
    estimates = estimated(Settings.load(), planned_ones, by_calls=calls)
    answers.print_estimates(estimates, by_calls=calls)
    for endpoint_id in estimates.unknown:
        _say(f"fal knows no endpoint {endpoint_id!r}; look it up on fal.ai/models")
    raise typer.Exit(UsageError.exit_code if estimates.unknown else 0)


@app.command(
    epilog='Example: faletl sql "select sum(cost_total) from reports.rpt_spend_daily" --format csv'
)
def sql(
    query: Annotated[str, typer.Argument(help="One select.")],
    output: Annotated[
        Literal["table", "csv", "json", "parquet"],
        typer.Option("--format", help="How to write rows."),
    ] = "table",
) -> None:
    """Ask what is published; never blocks a run, never changes anything."""
    from faletl import answers
    from faletl.config import Settings

    answers.print_query(Settings.load(), query, output)


@app.command(epilog="Example: faletl sandbox --port 8787 --seed 8")
def sandbox(
    host: Annotated[
        str, typer.Option(help="IPv4 address of this machine to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8787,
    as_of: Annotated[
        date | None,
        typer.Option(parser=_day, metavar="DATE", help="Speak the API as it was on that day of 2026."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another number invents other usage and charges.")] = 7,
) -> None:
    """A fal Platform API with invented data since 2025, until Ctrl-C; on loopback by default.

    The same seed and dates always give the same figures.
    """
    from faletl.sandbox import FULL_KEY, Sandbox, invented_world

    try:
        server = Sandbox(invented_world(seed, late=True), port, host=host, as_of=as_of)
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be had ({error.strerror}); name another with --host or --port"
        ) from None
    with server:
        typer.echo(f"Serving invented data on {server.url}; stop with Ctrl-C. To load it:")
        allowed = "" if server.url.startswith("http://127.") else "FALETL_ALLOW_HTTP=1 "
        typer.echo(f"  {allowed}FALETL_API_URL={server.url} FAL_KEY={FULL_KEY} faletl run")
        with suppress(_Stopped):  # the way it is meant to end
            server.serve_forever()
    _signals.clear()


@app.command(epilog="Example: faletl demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its files.")] = Path("faletl-demo"),
) -> None:
    """Sandbox, a run over this month and the last, and the first answers, in one go."""
    from faletl import demo

    with _progress() as progress:
        settings, report = demo.run(folder, progress)
    if report.exit_code == 0:
        demo.print_first_answers(settings)
    _finish(report, quiet=True)


# --- How results, progress and errors are told ----------------------------------------------------


def main() -> NoReturn:
    """Run the command line; always ends the process with a designed exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    # A crash of a library must not leave the memory, and so the key, in a file.
    setrlimit(RLIMIT_CORE, (0, getrlimit(RLIMIT_CORE)[1]))
    code = _run()
    if _signals:
        _say("interrupted; what was loaded stays, the same command goes on from here")
        code = 128 + _signals[0]
    sys.exit(code)


def _run() -> int:
    """Run the command line; every error becomes a sentence and an exit code."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; nothing is left to be said
        return 1
    except TyperException as error:
        text = error.format_message()
        if text.startswith("Usage:"):  # no command was given
            sys.stderr.write(f"{text}\n")
        else:
            _say(f"{text.rstrip('.')}; see faletl --help")
        return UsageError.exit_code
    except (FaletlError, _Stopped, Exception) as error:  # noqa: BLE001  # a bug of ours, too
        if _signals:  # told by main; DuckDB, say, makes an error of its own of an interrupted query
            return 1
        if isinstance(error, OSError):
            with suppress(OSError):
                sys.stdout.close()  # it may be stdout that takes no more, of what it holds still
        told = _of_the_system(error)
        _tell_error(told)
        return told.exit_code if isinstance(told, FaletlError) else 1
    return int(code or 0)


def _of_the_system(error: BaseException) -> BaseException:
    """An error of ours for what the system refused, which is no bug; any other as it is."""
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return ExhaustedError(
            "there is no memory left for this; raise its limit, or lower FALETL_PARALLEL, FALETL_MEMORY "
            "or FALETL_MAX_BODY"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return StorageError(f"the system refused{where}: {error.strerror}")
    return error


_signals: list[int] = []


def _on_signal(number: int, _frame: object) -> NoReturn:
    """Stop in good order at the first signal, at once at the second."""
    if _signals:
        os._exit(128 + number)
    _signals.append(number)
    raise _Stopped


def _version_of(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"faletl {__version__}")
        raise typer.Exit


def _finish(
    report: Report, *, quiet: bool = False, nothing: str = "nothing to do: no window was due"
) -> NoReturn:
    """Tell what was done on stdout and what failed on stderr; end with the report's exit code."""
    if not quiet:
        for sentence in list(_sentences(report)) or [nothing] * (report.exit_code == 0):
            typer.echo(sentence)
    for error, windows in _alike(report.failures):
        _tell_error(error, windows)
    raise typer.Exit(report.exit_code)


def _alike(
    failures: Iterable[tuple[Task | None, FaletlError]],
) -> Iterator[tuple[FaletlError, list[str]]]:
    """Each failure once, with the windows that failed in the same way, in order of time."""
    found: dict[tuple[type[FaletlError], str], tuple[FaletlError, list[Task]]] = {}
    for task, error in _with_damage_as_one(failures):
        first, tasks = found.setdefault((type(error), error.message), (error, []))
        if task is not None:
            tasks.append(task)
    for first, tasks in found.values():
        ordered = sorted(tasks, key=lambda task: task.window)
        yield first, [f"{task.resource.name} {task.window}" for task in ordered]


def _with_damage_as_one(
    failures: Iterable[tuple[Task | None, FaletlError]],
) -> Iterator[tuple[Task | None, FaletlError]]:
    """The failures, with one for all extracts that are damaged, at its first place."""
    every = list(failures)
    damaged = [error for _, error in every if isinstance(error, DamagedExtractError)]
    for task, error in every:
        if not isinstance(error, DamagedExtractError):
            yield task, error
        elif error is damaged[0]:
            one = DamagedExtractError.of_many(error, len(damaged))
            yield (task if one is error else None), one


def _sentences(report: Report) -> Iterator[str]:
    for name in RESOURCES:
        mine = [outcome for outcome in report.outcomes if outcome.resource == name]
        if mine:
            counts = {
                kind: sum(o.outcome == kind for o in mine)
                for kind in dict.fromkeys(o.outcome for o in mine)
            }
            told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            rows = sum(o.rows for o in mine)
            windows = "window" if len(mine) == 1 else "windows"
            yield f"{name}: {len(mine)} {windows} ({told}), {rows:,} rows"
    if report.build:
        yield f"built {report.build.days:,} days anew; {report.build.checks} checks found nothing"
        if report.build.runaways:
            charges = "charge" if report.build.runaways == 1 else "charges"
            yield f"{report.build.runaways:,} new runaway {charges}: see reports.rpt_runaway_requests"
    if report.published:
        yield f"published {report.published}"


def _tell_error(error: BaseException, windows: Sequence[str] = ()) -> None:
    """Report an error on one line; where several windows failed so, their number, first and last."""
    if _Options.debug:
        logging.getLogger("faletl").error("failed", exc_info=error)
    if not isinstance(error, FaletlError):
        # The text of a foreign exception may hold anything, so only its name is told.
        _say(f"unexpected {type(error).__name__}: this is a bug of faletl; --debug shows where")
    elif _Options.log_format == "json":
        many = {"windows": len(windows), "first": windows[0], "last": windows[-1]} if windows else {}
        with suppress(OSError):
            sys.stderr.write(json.dumps({**error.as_dict(), **many}) + "\n")
    elif len(windows) > 1:
        _say(f"{len(windows)} windows, {windows[0]} to {windows[-1]}: {error.sentence}")
    else:
        _say(str(error))


def _say(sentence: str) -> None:
    with suppress(OSError):  # there is nobody else to tell
        sys.stderr.write(f"faletl: {sentence}\n")


class _Stderr(logging.Handler):
    """Writes to what stderr is now: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk below the log is no reason to stop
            sys.stderr.write(self.format(record) + "\n")


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _set_up_logging() -> None:
    handler = _Stderr()
    is_json = _Options.log_format == "json"
    handler.setFormatter(_JsonLines() if is_json else logging.Formatter("%(message)s"))
    logger = logging.getLogger("faletl")
    logger.handlers, logger.propagate = [handler], False
    # Without a handler of its own it would show a traceback when a signal cuts a connection short.
    for name in ("sqlalchemy", "great_expectations"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    # On a terminal the bar tells the progress; elsewhere each window is one line.
    quiet = sys.stderr.isatty() and not is_json and not _Options.debug
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere the log lines tell."""
    if not sys.stderr.isatty() or _Options.log_format == "json":
        yield lambda _what, _done, _of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
