"""The `faletl` command: a thin skin on `faletl.pipeline`.

Results go to stdout, progress and sentences to stderr, the designed exit code to the shell. Nothing
heavy is imported before a command needs it: `faletl --help` answers at once.
"""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from resource import RLIMIT_CORE, getrlimit, setrlimit
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from faletl.cli.runtime import (
    Options,
    Stopped,
    finish,
    on_signal,
    print_version,
    progress_bar,
    run_command,
    say,
    set_up_logging,
    signals,
)
from faletl.errors import UsageError
from faletl.resources import RESOURCES
from faletl.windows import day_of

if TYPE_CHECKING:
    pass

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
            callback=lambda on: print_version(on),
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Remember what holds for every command."""
    from faletl.config import unknown_variables

    Options.debug, Options.log_format = debug, log_format
    set_up_logging()
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
    finish(report)


@app.command(epilog="Example: faletl extract --start 2026-11-01 --resource usage")
def extract(start: Start = None, end: End = None, resource: Resources = None) -> None:
    """Land and prove pages of what is due, or of the days given; load nothing."""
    from faletl import pipeline
    from faletl.config import Settings
    from faletl.selection import Asked

    with progress_bar() as progress:
        report = pipeline.extract(Settings.load(), Asked(start, end, resource or ()), progress)
    finish(report)


@app.command(epilog="Example: faletl load --resource usage")
def load(start: Start = None, end: End = None, resource: Resources = None) -> None:
    """Load what has landed and is not loaded yet; asks fal nothing."""
    from faletl import pipeline
    from faletl.config import Settings
    from faletl.selection import Asked

    with progress_bar() as progress:
        report = pipeline.load(Settings.load(), Asked(start, end, resource or ()), progress)
    finish(report, nothing="nothing to load: all that has landed is loaded")


@app.command(epilog="Example: faletl build --full")
def build(
    full: Annotated[bool, typer.Option("--full", help="Even if nothing changed.")] = False,
) -> None:
    """Build marts and reports from what is loaded, and check them."""
    from faletl import pipeline
    from faletl.config import Settings

    finish(pipeline.build(Settings.load(), full=full), nothing="nothing to build: nothing new is loaded")


@app.command(epilog="Example: faletl publish")
def publish() -> None:
    """Show the newest build to readers, in one step."""
    from faletl import pipeline
    from faletl.config import Settings

    finish(pipeline.publish(Settings.load()), nothing="nothing to publish: no newer build is there")


@app.command(epilog="Example: faletl rebuild --window 2026-11-01")
def rebuild(
    window: Annotated[
        date | None,
        typer.Option(parser=_day, metavar="DATE", help="Only this UTC day. Default: everything."),
    ] = None,
) -> None:
    """Make the warehouse anew from the landed pages alone; asks fal nothing."""
    from faletl.config import Settings
    from faletl.operations.rebuild import rebuild as rebuild_warehouse

    with progress_bar() as progress:
        report = rebuild_warehouse(Settings.load(), window, progress)
    finish(report, nothing="nothing to rebuild: nothing was ever loaded from landed pages")


@app.command(epilog="Example: faletl verify")
def verify() -> None:
    """Look whether loaded rows, their landed pages, sums and models are as they were left."""
    from faletl.config import Settings
    from faletl.errors import TamperedError
    from faletl.operations.verify import verify as verdict_on

    verdict = verdict_on(Settings.load())
    for sentence in verdict.findings:
        say(sentence)
    if not verdict.is_complete:
        say("sums and models were not looked at: something is not built yet; run faletl build")
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
    from faletl.cli.output import print_validations
    from faletl.config import Settings
    from faletl.operations.validate import validate as verdict_on
    from faletl.selection import Asked

    with progress_bar() as progress:
        verdict = verdict_on(Settings.load(), Asked(start, end, resource or ()), progress)
    print_validations(verdict)
    if docs is not None:
        from faletl.operations.validation_html import write_docs

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
    from faletl.operations.handover import hand_over
    from faletl.selection import Asked

    with progress_bar() as progress:
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
    from faletl.config import Settings
    from faletl.operations.accept import accept as accepted

    finish(accepted(Settings.load(), resource, day, reason=reason, account=account, is_kept=keep))


@quarantine_app.command("list", epilog="Example: faletl quarantine list --all")
def list_quarantine(
    with_resolved: Annotated[
        bool, typer.Option("--all", help="Also rows whose window was loaded since.")
    ] = False,
) -> None:
    """The rows set aside: where each stands, and what is wrong with it."""
    from faletl.cli.output import print_quarantine
    from faletl.config import Settings
    from faletl.operations.quarantine import rows_set_aside

    print_quarantine(rows_set_aside(Settings.load(), is_open=not with_resolved))


@quarantine_app.command(epilog="Example: faletl quarantine show 20261123T103000000000Z-a1b2c3")
def show(
    load_id: Annotated[str, typer.Argument(metavar="LOAD_ID", help="A read, from the list.")],
) -> None:
    """The rows of one read as fal sent them, with the page where each was landed."""
    from faletl.cli.output import print_rows_set_aside
    from faletl.config import Settings
    from faletl.operations.quarantine import rows_set_aside

    print_rows_set_aside(rows_set_aside(Settings.load(), load_id))


@quarantine_app.command(epilog="Example: faletl quarantine retry")
def retry(
    load_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[LOAD_ID…]", help="Only these reads.")
    ] = None,
) -> None:
    """Take the pages of open rows through the line once more, after an upgrade; asks fal nothing."""
    from faletl.config import Settings
    from faletl.operations.quarantine import retry as retried

    with progress_bar() as progress:
        report = retried(Settings.load(), load_ids or (), progress)
    finish(report, nothing="nothing to retry: no row is set aside")


@accounts_app.callback()
def accounts(context: typer.Context) -> None:
    """List the accounts where nothing else is asked for."""
    if context.invoked_subcommand is None:
        list_accounts()


@accounts_app.command("list", epilog="Example: faletl accounts list")
def list_accounts() -> None:
    """Each account: its label, fal's usernames of it, how many keys were seen, and what is loaded."""
    from faletl.cli.output import print_accounts
    from faletl.config import Settings

    print_accounts(Settings.load())


@accounts_app.command("rename", epilog="Example: faletl accounts rename acme acme-emea")
def rename_account(
    old: Annotated[str, typer.Argument(metavar="OLD", help="Its label, from the list.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new label, which no account has.")],
) -> None:
    """Rename an account in all tables, also for a later rebuild; then build and publish."""
    from faletl.config import Settings
    from faletl.operations.rename import rename

    report = rename(Settings.load(), old, new)
    typer.echo(f"account {old} is now {new}; say so in FALETL_ACCOUNT and FALETL_OWNERS, where set")
    finish(report)


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
    from faletl.operations.rename import extent, forget

    settings = Settings.load()
    found = extent(settings, name)
    told = f"{found.rows:,} rows of {found.days:,} days"
    if found.days:
        told += f", {found.first_day} to {found.last_day}"
    if not yes:
        raise UsageError(f"this would delete account {name!a}: {told}; if you mean it, add --yes")
    report = forget(settings, name)
    typer.echo(f"account {name} is forgotten: {told} deleted")
    finish(report)


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
    from faletl.cli.output import print_horizons
    from faletl.config import Settings

    settings = Settings.load()
    if set_ is not None:
        from faletl.line.accounts import set_horizon

        set_horizon(settings, set_, resource or (), account)
    print_horizons(settings, resource or (), account)


@landing_app.command(epilog="Example: faletl landing du")
def du() -> None:
    """How much the landed pages take, per resource, and how much of it prune would free."""
    from faletl.cli.output import print_landing
    from faletl.config import Settings

    print_landing(Settings.load())


@landing_app.command(epilog="Example: faletl landing prune --dry-run")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, only tell.")] = False,
) -> None:
    """Delete landed pages that nothing depends on, however young; rebuild gives the same as before.

    faletl maintain does it with those older than FALETL_KEEP_DAYS, and deletes what else is over.
    """
    from faletl.config import Settings
    from faletl.operations.rebuild import prune as prune_landing

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
    from faletl.operations.scrub import READABLE, read_page, scrubbed, write_page

    clean = scrubbed(read_page(page), keep_amounts=keep_amounts)
    if out is None:
        typer.echo(clean)
    else:
        write_page(clean, out)
    say(READABLE + "; all amounts, too" * keep_amounts + ": look at the page before you publish it")


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
    from faletl.cli.output import print_freed
    from faletl.config import Settings
    from faletl.operations.maintain import maintain as maintained

    done = maintained(Settings.load(), is_dry=dry_run)
    print_freed(done.freed, is_dry=dry_run)
    if not dry_run:
        finish(done.report, nothing="nothing to build: the tables are as they were")


@app.command(epilog="Example: faletl status --json")
def status(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Per resource: newest window, lag, rows, open failures; the last build and publication."""
    from faletl.cli.output import print_status
    from faletl.config import Settings

    print_status(Settings.load(), as_json=as_json)


@app.command(epilog="Example: FAL_KEY=id:secret faletl check")
def check() -> None:
    """Whether the key can read each resource, and what to do if not; a few tiny questions to fal."""
    from faletl.cli.output import print_check
    from faletl.config import Settings
    from faletl.operations.check import check as checked_by

    if not Options.debug:  # what is told below says it better than the client's log
        logging.getLogger("faletl.fal.client").setLevel(logging.ERROR)
    settings = Settings.load()
    checked = checked_by(settings)
    print_check(settings, checked)
    for problem in checked.problems:
        say(problem.sentence)
    raise typer.Exit(checked.exit_code)


@app.command(epilog="Example: FAL_KEY=id:secret faletl estimate fal-ai/flux/dev=1000 --calls")
def estimate(
    plans: Annotated[
        list[str], typer.Argument(metavar="ENDPOINT=QUANTITY…", help="How many units of which endpoint.")
    ],
    calls: Annotated[bool, typer.Option("--calls", help="Quantities are calls, not units.")] = False,
) -> None:
    """What fal says that units or calls would cost, beside what was really charged for them of late."""
    from faletl.cli.output import print_estimates
    from faletl.config import Settings
    from faletl.operations.estimate import estimate as estimated
    from faletl.operations.estimate import planned

    planned_ones = [planned(text, by_calls=calls) for text in plans]
    estimates = estimated(Settings.load(), planned_ones, by_calls=calls)
    print_estimates(estimates, by_calls=calls)
    for endpoint_id in estimates.unknown:
        say(f"fal knows no endpoint {endpoint_id!r}; look it up on fal.ai/models")
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
        with suppress(Stopped):  # the way it is meant to end
            server.serve_forever()
    signals.clear()


@app.command(epilog="Example: faletl demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its files.")] = Path("faletl-demo"),
) -> None:
    """Sandbox, a run over this month and the last, and the first answers, in one go."""
    from faletl.cli import demo

    with progress_bar() as progress:
        settings, report = demo.run(folder, progress)
    if report.exit_code == 0:
        demo.print_first_answers(settings)
    finish(report, quiet=True)


# --- How results, progress and errors are told ----------------------------------------------------


def main() -> NoReturn:
    """Run the command line; always ends the process with a designed exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    # A crash of a library must not leave the memory, and so the key, in a file.
    setrlimit(RLIMIT_CORE, (0, getrlimit(RLIMIT_CORE)[1]))
    code = run_command(app)
    if signals:
        say("interrupted; what was loaded stays, the same command goes on from here")
        code = 128 + signals[0]
    sys.exit(code)
