"""The `faletl` command: a thin skin on `faletl.pipeline` and `faletl.operations`.

Results go to stdout, progress and sentences to stderr, the designed exit code to the shell. A command
imports its heavy modules when it runs, so `faletl --help` answers at once.
"""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from resource import RLIMIT_CORE, getrlimit, setrlimit
from typing import Annotated, Literal, NoReturn

import typer

from faletl.cli.runtime import (
    Options,
    Stopped,
    on_signal,
    print_stderr,
    print_version,
    progress_bar,
    report_and_exit,
    run_command,
    set_up_logging,
    signals,
)
from faletl.errors import UsageError
from faletl.resources import RESOURCES
from faletl.windows import day_of

app = typer.Typer(
    name="faletl",
    help="Know what you spend on fal.ai: extract, prove, load and model its billing data.",
    epilog="Settings are environment variables; FAL_KEY is the one you need first. Exit codes: 0 done, "
    "1 failed, may be tried again, 2 wrong use, settings or key, 3 refused by a check, 4 stored data "
    "were changed by something else.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


landing_app = typer.Typer(
    help="Landed pages: show their size, delete those that nothing depends on, scrub one to share it.",
    epilog="Example: faletl landing du",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(landing_app, name="landing")

quarantine_app = typer.Typer(
    help="Rows that violate fal's contract: list them, show them, load them again from landed pages.",
    epilog="Example: faletl quarantine list",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(quarantine_app, name="quarantine")

accounts_app = typer.Typer(
    help="Accounts: list them, rename one, or forget one, which deletes its rows from all tables.",
    epilog="Example: faletl accounts rename acme acme-emea",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(accounts_app, name="accounts")


def _day(text: str) -> date:
    try:
        return day_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _resource(name: str) -> str:
    if name not in RESOURCES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(RESOURCES)}")
    return name


Start = Annotated[
    date | None,
    typer.Option(parser=_day, metavar="DATE", help="First UTC day. Days you name are fetched again."),
]
End = Annotated[
    date | None,
    typer.Option(
        parser=_day, metavar="DATE", help="Day after the last (exclusive). Default: up to now."
    ),
]
Resources = Annotated[
    list[str] | None,
    typer.Option(
        "--resource",
        parser=_resource,
        metavar="NAME",
        help=f"Only this resource: {', '.join(RESOURCES)}. Repeatable.",
    ),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Log every step, and tracebacks of errors.")] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Format of log lines and errors on stderr.")
    ] = "text",
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=lambda on: print_version(on),
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Set up logging for the command, and warn of unknown FALETL_ variables."""
    from faletl.config import unknown_variables

    Options.debug, Options.log_format = debug, log_format
    set_up_logging()
    for name, likely in unknown_variables().items():
        logging.getLogger("faletl").warning(
            "%s is not a setting of faletl%s", name, f"; did you mean {likely}?" if likely else ""
        )


@app.command(epilog="Example: FAL_KEY=id:secret faletl run --start 2026-11-01 --end 2026-11-08")
def run(
    start: Start = None,
    end: End = None,
    resource: Resources = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the due windows, calls and minutes.")
    ] = False,
) -> None:
    """Extract, prove, load, build and publish what is due, or the days you name."""
    from faletl import pipeline
    from faletl.cli.output import print_forecasts
    from faletl.config import Settings
    from faletl.selection import Asked

    if dry_run:
        settings = Settings.load()
        forecasts = pipeline.dry_run(settings, Asked(start, end, resource or ()))
        print_forecasts(settings, forecasts)
        return
    with progress_bar() as progress:
        report = pipeline.run(Settings.load(), Asked(start, end, resource or ()), progress)
    report_and_exit(report)


@app.command(epilog="Example: faletl extract --start 2026-11-01 --resource usage")
def extract(start: Start = None, end: End = None, resource: Resources = None) -> None:
    """Land and prove the pages of what is due, or of the days you name; load nothing."""
    from faletl import pipeline
    from faletl.config import Settings
    from faletl.selection import Asked

    with progress_bar() as progress:
        report = pipeline.extract(Settings.load(), Asked(start, end, resource or ()), progress)
    report_and_exit(report)


@app.command(epilog="Example: faletl load --resource usage")
def load(start: Start = None, end: End = None, resource: Resources = None) -> None:
    """Load landed extracts that are not loaded yet; fal is not called."""
    from faletl import pipeline
    from faletl.config import Settings
    from faletl.selection import Asked

    with progress_bar() as progress:
        report = pipeline.load(Settings.load(), Asked(start, end, resource or ()), progress)
    report_and_exit(report, nothing="nothing to load: every landed extract is loaded")


@app.command(epilog="Example: faletl build --full")
def build(
    full: Annotated[
        bool, typer.Option("--full", help="Build all days, even if nothing changed.")
    ] = False,
) -> None:
    """Build marts and reports from loaded rows, and check them."""
    from faletl import pipeline
    from faletl.config import Settings

    report_and_exit(
        pipeline.build(Settings.load(), full=full), nothing="nothing to build: no new rows are loaded"
    )


@app.command(epilog="Example: faletl publish")
def publish() -> None:
    """Show readers the newest build, in one step."""
    from faletl import pipeline
    from faletl.config import Settings

    report_and_exit(
        pipeline.publish(Settings.load()), nothing="nothing to publish: readers have the newest build"
    )


@app.command(epilog="Example: faletl rebuild --window 2026-11-01")
def rebuild(
    window: Annotated[
        date | None,
        typer.Option(parser=_day, metavar="DATE", help="Only this UTC day. Default: everything."),
    ] = None,
) -> None:
    """Rebuild the warehouse from landed pages alone; fal is not called."""
    from faletl.config import Settings
    from faletl.operations.rebuild import rebuild as rebuild_warehouse

    with progress_bar() as progress:
        report = rebuild_warehouse(Settings.load(), window, progress)
    report_and_exit(report, nothing="nothing to rebuild: no landed page was ever loaded")


@app.command(epilog="Example: faletl verify")
def verify() -> None:
    """Check that loaded rows, landed pages, sums and models are unchanged."""
    from faletl.config import Settings
    from faletl.errors import TamperedError
    from faletl.operations.verify import verify as verify_warehouse

    verification = verify_warehouse(Settings.load())
    for sentence in verification.findings:
        print_stderr(sentence)
    if not verification.is_complete:
        print_stderr(
            "sums and models were not verified: loaded rows are not built yet; run faletl build"
        )
    if verification.findings:
        raise typer.Exit(TamperedError.exit_code)
    verified = "ledger, rows, landed pages" + ", sums and models" * verification.is_complete
    typer.echo(f"verified: {verified} are unchanged")


@app.command(epilog="Example: faletl validate --resource usage --start 2026-11-01 --docs validation")
def validate(
    start: Start = None,
    end: End = None,
    resource: Resources = None,
    docs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the results as HTML pages."),
    ] = None,
) -> None:
    """Run the gate again over loaded windows: all, or the days and resources you name."""
    from faletl.cli.output import print_validations
    from faletl.config import Settings
    from faletl.operations.validate import validate as run_gate
    from faletl.selection import Asked

    with progress_bar() as progress:
        gate_report = run_gate(Settings.load(), Asked(start, end, resource or ()), progress)
    print_validations(gate_report)
    if docs is not None:
        from faletl.operations.validation_html import write_docs

        typer.echo(f"wrote {write_docs(docs, gate_report)}")
    raise typer.Exit(gate_report.exit_code)


@app.command(epilog="Example: faletl stage --out handover --start 2026-11-01 --resource usage")
def stage(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")],
    start: Start = None,
    end: End = None,
    resource: Resources = None,
) -> None:
    """Write loaded days as typed Parquet files for another engine; unchanged days are skipped."""
    from faletl.config import Settings
    from faletl.operations.handover import hand_over
    from faletl.selection import Asked

    with progress_bar() as progress:
        handover = hand_over(Settings.load(), out, Asked(start, end, resource or ()), progress)
    typer.echo(
        f"{out}: {len(handover.written):,} files written, {handover.unchanged:,} unchanged, "
        f"{len(handover.deleted):,} deleted"
    )


@app.command(epilog="Example: faletl grant --reader analysts")
def grant(
    reader: Annotated[str, typer.Option(metavar="ROLE", help="A role of the database server.")],
) -> None:
    """Let a role of a server warehouse read marts and reports, and nothing else."""
    from faletl.config import Settings
    from faletl.warehouse import open_warehouse

    open_warehouse(Settings.load()).grant(reader)
    typer.echo(f"{reader} may read marts and reports now, and after every build")


@app.command(epilog='Example: faletl accept usage 2026-11-20 --reason "fal confirmed it in ticket 4711"')
def accept(
    resource: Annotated[
        str, typer.Argument(parser=_resource, metavar="RESOURCE", help=f"One of {', '.join(RESOURCES)}.")
    ],
    day: Annotated[date, typer.Argument(parser=_day, metavar="DAY", help="The UTC day.")],
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Why you accept it; stored in ops.acceptances.")
    ],
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Account label, if several have such a day.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Confirm the loaded rows instead of the held extract.")
    ] = False,
) -> None:
    """Load a held extract, or a day that a contract rule refused; --keep confirms the loaded rows."""
    from faletl.config import Settings
    from faletl.operations.accept import accept as accept_window

    report_and_exit(
        accept_window(Settings.load(), resource, day, reason=reason, account=account, is_kept=keep)
    )


@quarantine_app.command("list", epilog="Example: faletl quarantine list --all")
def list_quarantine(
    with_resolved: Annotated[
        bool, typer.Option("--all", help="Also resolved rows: their window was loaded since.")
    ] = False,
) -> None:
    """List the quarantined rows: where each is, and what is wrong with it."""
    from faletl.cli.output import print_quarantine
    from faletl.config import Settings
    from faletl.operations.quarantine import quarantined_rows

    print_quarantine(quarantined_rows(Settings.load(), is_open=not with_resolved))


@quarantine_app.command(epilog="Example: faletl quarantine show 20261123T103000000000Z-a1b2c3")
def show(
    load_id: Annotated[str, typer.Argument(metavar="LOAD_ID", help="Id of an extract, from the list.")],
) -> None:
    """Show the quarantined rows of one extract as fal sent them, with the landed page of each."""
    from faletl.cli.output import print_quarantined_rows
    from faletl.config import Settings
    from faletl.operations.quarantine import quarantined_rows

    print_quarantined_rows(quarantined_rows(Settings.load(), load_id))


@quarantine_app.command(epilog="Example: faletl quarantine retry")
def retry(
    load_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[LOAD_ID…]", help="Only these extracts.")
    ] = None,
) -> None:
    """Load the pages of quarantined rows again, after an upgrade of faletl; fal is not called."""
    from faletl.config import Settings
    from faletl.operations.quarantine import retry as retry_rows

    with progress_bar() as progress:
        report = retry_rows(Settings.load(), load_ids or (), progress)
    report_and_exit(report, nothing="nothing to retry: no row is quarantined")


@accounts_app.callback()
def accounts(context: typer.Context) -> None:
    """List the accounts unless a subcommand is named."""
    if context.invoked_subcommand is None:
        list_accounts()


@accounts_app.command("list", epilog="Example: faletl accounts list")
def list_accounts() -> None:
    """List each account: label, usernames at fal, number of keys seen, first and last loaded day."""
    from faletl.cli.output import print_accounts
    from faletl.config import Settings

    print_accounts(Settings.load())


@accounts_app.command("rename", epilog="Example: faletl accounts rename acme acme-emea")
def rename_account(
    old: Annotated[str, typer.Argument(metavar="OLD", help="Label of the account, from the list.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="New label; no other account may have it.")],
) -> None:
    """Rename an account in all tables, also for later rebuilds; then build and publish."""
    from faletl.config import Settings
    from faletl.operations.rename import rename

    report = rename(Settings.load(), old, new)
    typer.echo(
        f"account {old} is now {new}; change FALETL_ACCOUNT and FALETL_OWNERS too, if they name it"
    )
    report_and_exit(report)


@accounts_app.command("forget", epilog="Example: faletl accounts forget trial --yes")
def forget_account(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Label of the account, from the list.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete; without it, only print what would be deleted.")
    ] = False,
) -> None:
    """Delete an account's rows from all tables, also for later rebuilds; then build and publish.

    Its landed pages stay until faletl landing prune deletes them; they are not loaded again.
    """
    from faletl.config import Settings
    from faletl.operations.rename import extent, forget

    settings = Settings.load()
    loaded = extent(settings, name)
    extent_text = f"{loaded.rows:,} rows of {loaded.days:,} days"
    if loaded.days:
        extent_text += f", {loaded.first_day} to {loaded.last_day}"
    if not yes:
        raise UsageError(f"this would delete account {name!a}: {extent_text}; add --yes to delete it")
    report = forget(settings, name)
    typer.echo(f"account {name} is forgotten: {extent_text} deleted")
    report_and_exit(report)


@app.command(epilog="Example: faletl horizon --set 2026-01-01 --resource usage")
def horizon(
    set_: Annotated[
        date | None,
        typer.Option("--set", parser=_day, metavar="DATE", help="The new first day."),
    ] = None,
    resource: Resources = None,
    account: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Account; default: that of FALETL_ACCOUNT or FAL_KEY."),
    ] = None,
) -> None:
    """Show the first UTC day that runs keep complete, per account and resource; --set moves it.

    After a move to an earlier day, the days in between are due. After a move to a later day, nothing is
    deleted, and loaded days before it are not extracted again.
    """
    from faletl.cli.output import print_horizons
    from faletl.config import Settings

    settings = Settings.load()
    if set_ is not None:
        from faletl.line.accounts import set_horizon

        set_horizon(settings, set_, resource or (), account)
    print_horizons(settings, resource or (), account)


@landing_app.command(epilog="Example: faletl landing du")
def du() -> None:
    """Show the size of landed pages per resource, and how much of it prune would free."""
    from faletl.cli.output import print_landing
    from faletl.config import Settings

    print_landing(Settings.load())


@landing_app.command(epilog="Example: faletl landing prune --dry-run")
def prune(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Delete nothing, only print the sums.")
    ] = False,
) -> None:
    """Delete landed pages that nothing depends on, of any age; a rebuild gives the same as before.

    faletl maintain deletes only those older than FALETL_KEEP_DAYS, and other obsolete data too.
    """
    from faletl.config import Settings
    from faletl.operations.rebuild import prune as prune_landing

    folders, size = prune_landing(Settings.load(), is_dry=dry_run)
    typer.echo(f"{len(folders):,} extracts, {size:,} bytes {'would be ' * dry_run}deleted")


@landing_app.command(
    epilog="Example: faletl landing scrub landing/acme/usage/…/….json.zst --out page.json"
)
def scrub(
    page: Annotated[
        str, typer.Argument(metavar="PAGE", help="A page of the landing folder, or a JSON file.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new file to write to. Default: stdout.")
    ] = None,
    keep_amounts: Annotated[
        bool, typer.Option("--keep-amounts", help="Keep amounts, quantities, counts and durations.")
    ] = False,
) -> None:
    """Replace names, ids, texts and amounts of a page, so that it can be published in an issue.

    Field names, times, fal-ai/… endpoint ids, known units, currencies and the number of rows stay
    readable, as do the length, sign and zeros of each number. Equal texts get the same replacement.
    """
    from faletl.operations.scrub import READABLE, read_page, scrubbed, write_page

    clean = scrubbed(read_page(page), keep_amounts=keep_amounts)
    if out is None:
        typer.echo(clean)
    else:
        write_page(clean, out)
    print_stderr(
        READABLE + "; all amounts, too" * keep_amounts + ": look at the page before you publish it"
    )


@app.command(epilog="Example: faletl maintain --dry-run")
def maintain(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Delete nothing, only print what would be deleted.")
    ] = False,
) -> None:
    """Delete data older than FALETL_KEEP_DAYS and FALETL_KEEP_OPS_DAYS; then build and publish.

    Deleted are superseded landed pages, snapshots that equal the one before, ops rows about past runs,
    and files that killed commands left. Reports and faletl rebuild give the same as before.
    """
    from faletl.cli.output import print_freed
    from faletl.config import Settings
    from faletl.operations.maintain import maintain as run_maintenance

    maintained = run_maintenance(Settings.load(), is_dry=dry_run)
    print_freed(maintained.freed, is_dry=dry_run)
    if not dry_run:
        report_and_exit(maintained.report, nothing="nothing to build: the tables are unchanged")


@app.command(epilog="Example: faletl status --json")
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show per resource the newest window, lag, rows and open failures; and the last build."""
    from faletl.cli.output import print_status
    from faletl.config import Settings

    print_status(Settings.load(), as_json=as_json)


@app.command(epilog="Example: FAL_KEY=id:secret faletl check")
def check() -> None:
    """Check that the key can read each resource; if not, print what to do. Makes a few tiny calls."""
    from faletl.cli.output import print_check
    from faletl.config import Settings
    from faletl.operations.check import check as check_keys

    if not Options.debug:  # the sentences below explain more than the client's log
        logging.getLogger("faletl.fal.client").setLevel(logging.ERROR)
    settings = Settings.load()
    report = check_keys(settings)
    print_check(settings, report)
    for problem in report.problems:
        print_stderr(problem.sentence)
    raise typer.Exit(report.exit_code)


@app.command(epilog="Example: FAL_KEY=id:secret faletl estimate fal-ai/flux/dev=1000 --calls")
def estimate(
    plans: Annotated[
        list[str], typer.Argument(metavar="ENDPOINT=QUANTITY…", help="Endpoint, and number of units.")
    ],
    calls: Annotated[bool, typer.Option("--calls", help="Quantities are calls, not units.")] = False,
) -> None:
    """Show fal's cost estimate for units or calls, next to what was charged in the last 30 days."""
    from faletl.cli.output import print_estimates
    from faletl.config import Settings
    from faletl.operations.estimate import estimate as ask_estimates
    from faletl.operations.estimate import planned

    planned_uses = [planned(text, by_calls=calls) for text in plans]
    estimates = ask_estimates(Settings.load(), planned_uses, by_calls=calls)
    print_estimates(estimates, by_calls=calls)
    for endpoint_id in estimates.unknown:
        print_stderr(f"fal knows no endpoint {endpoint_id!r}; look it up on fal.ai/models")
    raise typer.Exit(UsageError.exit_code if estimates.unknown else 0)


@app.command(
    epilog='Example: faletl sql "select sum(cost_total) from reports.rpt_spend_daily" --format csv'
)
def sql(
    query: Annotated[str, typer.Argument(help="One select statement.")],
    output: Annotated[
        Literal["table", "csv", "json", "parquet"],
        typer.Option("--format", help="Output format."),
    ] = "table",
) -> None:
    """Query the published tables; never blocks a run, never changes anything."""
    from faletl.cli.output import print_query
    from faletl.config import Settings

    print_query(Settings.load(), query, output)


@app.command(epilog="Example: faletl sandbox --port 8787 --seed 8")
def sandbox(
    host: Annotated[
        str, typer.Option(help="IPv4 address of this machine to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8787,
    as_of: Annotated[
        date | None,
        typer.Option(parser=_day, metavar="DATE", help="Serve the API as it was on that day of 2026."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the invented usage and charges.")] = 7,
) -> None:
    """Serve a fal Platform API with invented data since 2025, until Ctrl-C; on loopback by default.

    The same seed and dates always give the same figures.
    """
    from faletl.sandbox import FULL_KEY, Sandbox, invented_world

    try:
        server = Sandbox(invented_world(seed, late=True), port, host=host, as_of=as_of)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port"
        ) from None
    with server:
        typer.echo(f"Serving invented data on {server.url}; stop with Ctrl-C. To load it:")
        allowed = "" if server.url.startswith("http://127.") else "FALETL_ALLOW_HTTP=1 "
        typer.echo(f"  {allowed}FALETL_API_URL={server.url} FAL_KEY={FULL_KEY} faletl run")
        with suppress(Stopped):  # Ctrl-C is how it ends
            server.serve_forever()
    signals.clear()


@app.command(epilog="Example: faletl demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the files of the demo.")] = Path(
        "faletl-demo"
    ),
) -> None:
    """Try faletl: load two months of invented data from a sandbox, and print the first answers."""
    from faletl.cli import demo

    with progress_bar() as progress:
        settings, report = demo.run(folder, progress)
    if report.exit_code == 0:
        demo.print_first_answers(settings)
    report_and_exit(report, quiet=True)


# --- The entry point ----------------------------------------------------


def main() -> NoReturn:
    """Run the command line; always end the process with a designed exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    # No core dumps: a crashing library must not write the memory, and the key in it, to a file.
    setrlimit(RLIMIT_CORE, (0, getrlimit(RLIMIT_CORE)[1]))
    code = run_command(app)
    if signals:
        print_stderr("interrupted; loaded windows stay; run the same command again to continue")
        code = 128 + signals[0]
    sys.exit(code)
