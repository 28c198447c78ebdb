"""Check: whether the keys can read each resource, and what a person has to do where they cannot.

It asks for as little as fal's API allows, soon gives up, writes nothing and needs no warehouse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from faletl.config import Settings
from faletl.errors import (
    AccountLockedError,
    ApiUnavailableError,
    FaletlError,
    KeyRefusedError,
    NotFoundError,
    WebPageError,
)
from faletl.fal.client import FalClient
from faletl.fal.limiter import Patience
from faletl.fal.pages import read_envelope
from faletl.fal.questions import ask_in_either_form, bounds, first_endpoint
from faletl.line.accounts import read_username
from faletl.resources import CREDITS, MAKE_A_KEY, MODELS, PRICES, RESOURCES, Question, Resource
from faletl.staging.contract import has_value
from faletl.windows import HOUR, SETTLE, Window
from faletl.wire import Params

PATIENCE = Patience(tries=2, deadline_seconds=10, retry_after_seconds=5, give_up_seconds=5)

KNOWN_ENDPOINT = "fal-ai/flux/dev"
"""Asked for where the catalogue names no endpoint: one of the oldest and most used."""

LIMITED = frozenset({"/models", "/models/usage", "/models/analytics", "/models/billing-events"})
"""The paths that document `limit`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one resource can be read, with the key of which setting; None where that is not known.

    `sentence` says what to do, or what to know. It is empty when all is well.
    """

    resource: str
    key_name: str
    is_readable: bool | None
    sentence: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """What concerns more than one resource: account, network, host, a whole key, the clock."""

    sentence: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Checked:
    """A finding for each resource of the catalogue, in its order, and what concerns several of them.

    `account` is fal's name of the account, where fal told it.
    """

    account: str | None
    findings: Sequence[Finding]
    problems: Sequence[Problem]

    @property
    def exit_code(self) -> int:
        """The highest of all; 0 when everything can be read (README, "Exit codes")."""
        codes = [one.exit_code for one in self.findings] + [one.exit_code for one in self.problems]
        return max(codes, default=0)

    @property
    def why_refused(self) -> str | None:
        """What is wrong with a whole key or with the settings, if anything is."""
        wrong = (one.sentence for one in self.problems if one.exit_code == KEY_OR_SETTINGS)
        return next(wrong, None)


def check(settings: Settings) -> Checked:
    """Ask, in its smallest form, each question that a run asks, and tell what the answers mean.

    Raises:
        SettingsError: FAL_KEY is not set, or FALETL_CA_FILE holds no certificates. All else is told in
            what is returned.
    """
    settings.require_key()
    results: dict[str, FaletlError | None] = {}
    problems: list[Problem] = []
    bad_keys: set[str] = set()
    with FalClient(settings, PATIENCE) as client:
        probe = _Probe(client)
        # The catalogue first: it needs no permission, so it shows whether this is fal at all.
        for resource in sorted(RESOURCES.values(), key=lambda one: one is not MODELS):
            key_name = settings.key_name(metrics=resource.uses_metrics_key)
            if key_name in bad_keys:
                continue
            error = probe.error_of(resource)
            problem = error and problem_of(settings, error)
            is_of_all = resource is MODELS or isinstance(error, AccountLockedError)
            if error and problem and (is_of_all or error.facts.get("cause")):
                problems.append(problem)
                break  # the others would fail alike, and only take their time
            results[resource.name] = error
            if isinstance(error, KeyRefusedError) and not probe.is_accepted(resource.uses_metrics_key):
                problems.append(Problem(_BAD_KEY.format(name=key_name), KEY_OR_SETTINGS))
                bad_keys.add(key_name)
    if client.clock_skew_seconds is not None:
        problems.append(Problem(_SKEW.format(minutes=client.clock_skew_seconds / 60), 0))
    findings = [
        _finding(settings, resource, results, bad_keys, probe.note(resource))
        for resource in RESOURCES.values()
    ]
    return Checked(probe.account, findings, problems)


def problem_of(settings: Settings, error: FaletlError) -> Problem | None:
    """What an error of the client says about account, network or host; None when it is about none.

    For failing tasks, too: its sentence tells what to look at.
    """
    if isinstance(error, AccountLockedError):
        return Problem(error.sentence, error.exit_code)
    status, cause = error.facts.get("status"), error.facts.get("cause")
    if cause is not None:
        is_setting = cause in ("proxy", "certificate")
        sentence, exit_code = _CAUSES[str(cause)], KEY_OR_SETTINGS if is_setting else FAILED
        if settings.proxy is not None and cause != "proxy":
            sentence += " (asked through the proxy of FALETL_PROXY)"
    elif isinstance(status, int) and 300 <= status < 400:
        sentence, exit_code = _REDIRECT, KEY_OR_SETTINGS
    elif isinstance(error, WebPageError):
        sentence, exit_code = _WEB_PAGE, KEY_OR_SETTINGS
    elif isinstance(error, NotFoundError) and error.facts.get("path") == MODELS.path:
        sentence, exit_code = _NO_CATALOGUE, KEY_OR_SETTINGS
    else:
        return None
    return Problem(sentence.format(url=settings.api_url), exit_code)


FAILED, KEY_OR_SETTINGS = ApiUnavailableError.exit_code, KeyRefusedError.exit_code

# By `cause` of an ApiUnavailableError.
_CAUSES = {
    "dns": "the host of {url} has no address here; is this machine online, does its DNS work?",
    "refused": "{url} refuses connections: nothing listens there, or a firewall; try again later",
    "timeout": "{url} does not answer in time; is this machine online? Try again later",
    "connection": "the connection to {url} broke off; try again later",
    "proxy": "the proxy lets nothing through to {url}; set FALETL_PROXY right",
    "certificate": "this machine does not trust the certificate of {url}; where a proxy has one of its "
    "own, set FALETL_CA_FILE, else set FALETL_API_URL right",
}
_IS_IT_FAL = (
    "set FALETL_API_URL to https://api.fal.ai/v1; where it is that, a proxy or a portal answers instead"
)
_REDIRECT = f"{{url}} sends elsewhere, where a key must not follow; {_IS_IT_FAL}"
_WEB_PAGE = f"{{url}} answers with a web page, not as fal's API does; {_IS_IT_FAL}"
_NO_CATALOGUE = f"{{url}} has no catalogue of models (404), so it is not fal's API; {_IS_IT_FAL}"
_BAD_KEY = (
    "fal does not accept {name} for anything: it is mistyped or revoked; "
    f"correct it, or {MAKE_A_KEY}, and set {{name}}=key_id:secret"
)
_SKEW = (
    "this machine's clock and fal's are {minutes:,.0f} minutes apart; if it is this one that is wrong, "
    "set it right: it decides which hours are over"
)
_SAYS_NOTHING = "fal sends no {column} for this account, so nothing is loaded; that is not an error"
_TOTAL_REFUSED = "fal refuses the control total to this key; two equal walks stand in for it"


def _finding(
    settings: Settings,
    resource: Resource,
    results: Mapping[str, FaletlError | None],
    bad_keys: set[str],
    note: str,
) -> Finding:
    key_name = settings.key_name(metrics=resource.uses_metrics_key)

    def finding(is_readable: bool | None, sentence: str = "", exit_code: int = 0) -> Finding:
        return Finding(resource.name, key_name, is_readable, sentence, exit_code)

    error = results.get(resource.name)
    if resource.name in results and error is None:
        return finding(True, note)
    if key_name in bad_keys:
        return finding(False, f"replace {key_name}", KEY_OR_SETTINGS)
    if error is None:
        return finding(None, "not asked")
    if isinstance(error, KeyRefusedError):
        is_for_any = resource.presets == PRICES.presets
        told = str(error) if is_for_any else _remedy(resource, key_name)
        return finding(False, told, error.exit_code)
    if problem := problem_of(settings, error):
        return finding(None, problem.sentence, problem.exit_code)
    if isinstance(error, ApiUnavailableError):
        return finding(None, f"{error}; try again later", error.exit_code)
    return finding(None, f"{error}; upgrade faletl, or check FALETL_API_URL", error.exit_code)


def _remedy(resource: Resource, key_name: str) -> str:
    """What to do where fal refuses a key that it accepts for other things."""
    left_out = f"; until then {resource.name} is left out" if resource.is_optional else ""
    return f"{key_name} needs {resource.needs}; {MAKE_A_KEY}{left_out}"


class _Probe:
    """The questions of one check, as they are asked. Each is asked once."""

    def __init__(self, client: FalClient) -> None:
        self.account: str | None = None
        self._client = client
        end = (datetime.now(UTC) - SETTLE).replace(minute=0, second=0, microsecond=0)
        self._hour = Window(end - HOUR, end)
        self._ids = [KNOWN_ENDPOINT]
        self._accepted: dict[bool, bool] = {}
        self._refused_totals: dict[str, bool] = {}  # by path: they differ in what is compared only
        self._say_nothing: set[str] = set()  # resources whose answer held no record

    def error_of(self, resource: Resource) -> FaletlError | None:
        """Ask all questions of the resource, and for its control total; return why not, if so."""
        try:
            body = self._ask(resource, metrics=resource.uses_metrics_key)
            if resource is MODELS:
                self._ids = list(dict.fromkeys([*first_endpoint(body), KNOWN_ENDPOINT]))
            if resource is CREDITS:
                self.account = read_username(body)
            if resource.nothing_without and not has_value(body, resource, resource.nothing_without):
                self._say_nothing.add(resource.name)
            self._ask_total(resource)
        except FaletlError as error:
            return error
        return None

    def note(self, resource: Resource) -> str:
        """What to know of a resource that can be read; mostly empty."""
        if resource.name in self._say_nothing:
            return _SAYS_NOTHING.format(column=resource.nothing_without)
        is_refused = resource.proof is not None and self._refused_totals.get(resource.proof.path, False)
        return _TOTAL_REFUSED if is_refused else ""

    def is_accepted(self, metrics: bool) -> bool:
        """Whether fal accepts the key at all: prices are shown to any key."""
        if metrics not in self._accepted:
            try:
                self._ask(PRICES, metrics=metrics)
                self._accepted[metrics] = True
            except FaletlError as error:
                self._accepted[metrics] = not isinstance(error, KeyRefusedError)
        return self._accepted[metrics]

    def _ask(self, resource: Resource, *, metrics: bool) -> bytes:
        """Ask all questions of the resource; return the first answer."""
        more = bounds(self._hour) if resource.window == "day" else {}
        if resource.ids_per_call is None:
            return self._ask_all(resource, more, metrics)
        for endpoint_id in self._ids[:-1]:
            try:
                return self._ask_all(resource, {**more, "endpoint_id": (endpoint_id,)}, metrics)
            except NotFoundError:
                continue  # fal may list what it has no price for
        return self._ask_all(resource, {**more, "endpoint_id": (self._ids[-1],)}, metrics)

    def _ask_all(self, resource: Resource, more: Params, metrics: bool) -> bytes:
        bodies: list[bytes] = []
        is_older = False

        def ask(question: Question) -> None:
            params = {**question, **more}
            bodies.append(self._get(resource.path, params, resource.rows_path, metrics))

        for number in range(len(resource.params)):
            is_older = ask_in_either_form(resource, number, ask, is_older=is_older)
        return bodies[0]

    def _ask_total(self, resource: Resource) -> None:
        proof = resource.proof
        if proof is None or proof.path in self._refused_totals:
            return
        params = {**proof.params, **bounds(self._hour)}
        try:
            self._get(proof.path, params, proof.rows_path, resource.uses_metrics_key)
            self._refused_totals[proof.path] = False
        except KeyRefusedError:
            self._refused_totals[proof.path] = True

    def _get(self, path: str, params: Params, rows_path: tuple[str, ...], metrics: bool) -> bytes:
        if path in LIMITED:
            params = {**params, "limit": "1"}
        answer, _ = self._client.get(
            path, params, lambda body: read_envelope(body, rows_path), metrics=metrics
        )
        return answer.body
