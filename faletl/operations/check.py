"""Check: find out whether the keys can read each resource, and what to do if they cannot.

It makes the smallest calls that fal's API allows, gives up soon, writes nothing and needs no warehouse.
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
"""An endpoint to ask for if the catalogue lists none: one of the oldest and most used."""

LIMITED = frozenset({"/models", "/models/usage", "/models/analytics", "/models/billing-events"})
"""The paths that document `limit`."""


@dataclass(frozen=True, slots=True)
class ResourceAccess:
    """Whether the key of one setting can read one resource; None if that is not known.

    `sentence` gives advice or a remark. It is empty when all is well.
    """

    resource: str
    key_name: str
    is_readable: bool | None
    sentence: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of more than one resource: account, network, host, a whole key, the clock."""

    sentence: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The access to each resource, in the order of the catalogue, and problems of several of them.

    `account` is fal's name of the account, if fal sent it.
    """

    account: str | None
    findings: Sequence[ResourceAccess]
    problems: Sequence[Problem]

    @property
    def exit_code(self) -> int:
        """The highest exit code; 0 when everything can be read (README, "Exit codes")."""
        codes = [item.exit_code for item in self.findings] + [item.exit_code for item in self.problems]
        return max(codes, default=0)

    @property
    def why_refused(self) -> str | None:
        """The sentence about a refused key or wrong settings, if there is one."""
        sentences = (
            problem.sentence for problem in self.problems if problem.exit_code == KEY_OR_SETTINGS
        )
        return next(sentences, None)


def check(settings: Settings) -> CheckReport:
    """Make each call that a run makes, in its smallest form, and explain the answers.

    Raises:
        SettingsError: FAL_KEY is not set, or FALETL_CA_FILE has no certificates. The report contains
            every other problem.
    """
    settings.require_key()
    results: dict[str, FaletlError | None] = {}
    problems: list[Problem] = []
    bad_keys: set[str] = set()
    with FalClient(settings, PATIENCE) as client:
        probe = _Probe(client)
        # The catalogue first: it needs no permission, so it shows whether the host is fal at all.
        for resource in sorted(RESOURCES.values(), key=lambda resource: resource is not MODELS):
            key_name = settings.key_name(metrics=resource.uses_metrics_key)
            if key_name in bad_keys:
                continue
            error = probe.error_of(resource)
            problem = error and problem_of(settings, error)
            is_of_all = resource is MODELS or isinstance(error, AccountLockedError)
            if error and problem and (is_of_all or error.facts.get("cause")):
                problems.append(problem)
                break  # the others would fail in the same way, after the same wait
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
    return CheckReport(probe.account, findings, problems)


def problem_of(settings: Settings, error: FaletlError) -> Problem | None:
    """Explain an error of the client that comes from account, network or host; None for other errors.

    Failing tasks use it too: the sentence names what to look at.
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
    "dns": "the host of {url} has no address here; check that this machine is online and its DNS works",
    "refused": "{url} refuses connections: no server listens, or a firewall blocks it; try again later",
    "timeout": "{url} does not answer in time; check that this machine is online, and try again later",
    "connection": "the connection to {url} broke; try again later",
    "proxy": "the proxy does not connect to {url}; correct FALETL_PROXY",
    "certificate": "this machine does not trust the certificate of {url}; if a proxy uses its own "
    "certificate, set FALETL_CA_FILE, else correct FALETL_API_URL",
}
_IS_IT_FAL = (
    "set FALETL_API_URL to https://api.fal.ai/v1; if it is already, a proxy or portal answers instead"
)
_REDIRECT = f"{{url}} redirects to another host, which must not receive a key; {_IS_IT_FAL}"
_WEB_PAGE = f"{{url}} answers with a web page, which fal's API never does; {_IS_IT_FAL}"
_NO_CATALOGUE = f"{{url}} has no catalogue of models (404), so it is not fal's API; {_IS_IT_FAL}"
_BAD_KEY = (
    "fal does not accept {name} for anything: it is mistyped or revoked; "
    f"correct it, or {MAKE_A_KEY}, and set {{name}}=key_id:secret"
)
_SKEW = (
    "this machine's clock differs from fal's by {minutes:,.0f} minutes; check NTP: the clock decides "
    "which hours are over"
)
_SENDS_NOTHING = "fal sends no {column} for this account, so nothing is loaded; that is not an error"
_TOTAL_REFUSED = "this key may not read the control total; two identical fetches prove the pages instead"


def _finding(
    settings: Settings,
    resource: Resource,
    results: Mapping[str, FaletlError | None],
    bad_keys: set[str],
    note: str,
) -> ResourceAccess:
    key_name = settings.key_name(metrics=resource.uses_metrics_key)

    def finding(is_readable: bool | None, sentence: str = "", exit_code: int = 0) -> ResourceAccess:
        return ResourceAccess(resource.name, key_name, is_readable, sentence, exit_code)

    error = results.get(resource.name)
    if resource.name in results and error is None:
        return finding(True, note)
    if key_name in bad_keys:
        return finding(False, f"replace {key_name}", KEY_OR_SETTINGS)
    if error is None:
        return finding(None, "not checked")
    if isinstance(error, KeyRefusedError):
        any_key_may_read = resource.presets == PRICES.presets
        sentence = str(error) if any_key_may_read else _remedy(resource, key_name)
        return finding(False, sentence, error.exit_code)
    if problem := problem_of(settings, error):
        return finding(None, problem.sentence, problem.exit_code)
    if isinstance(error, ApiUnavailableError):
        return finding(None, f"{error}; try again later", error.exit_code)
    return finding(None, f"{error}; upgrade faletl, or check FALETL_API_URL", error.exit_code)


def _remedy(resource: Resource, key_name: str) -> str:
    """Return what to do about a key that fal accepts, but not for this resource."""
    left_out = f"; until then {resource.name} is left out" if resource.is_optional else ""
    return f"{key_name} needs {resource.needs}; {MAKE_A_KEY}{left_out}"


class _Probe:
    """The calls of one check. Each is made once."""

    def __init__(self, client: FalClient) -> None:
        self.account: str | None = None
        self._client = client
        end = (datetime.now(UTC) - SETTLE).replace(minute=0, second=0, microsecond=0)
        self._hour = Window(end - HOUR, end)
        self._ids = [KNOWN_ENDPOINT]
        self._accepted: dict[bool, bool] = {}
        self._refused_totals: dict[str, bool] = {}  # by path, as resources may share a control total
        self._empty_resources: set[str] = set()  # resources whose answer had no record

    def error_of(self, resource: Resource) -> FaletlError | None:
        """Make all calls of the resource and of its control total; return the error, if one failed."""
        try:
            body = self._ask(resource, metrics=resource.uses_metrics_key)
            if resource is MODELS:
                self._ids = list(dict.fromkeys([*first_endpoint(body), KNOWN_ENDPOINT]))
            if resource is CREDITS:
                self.account = read_username(body)
            if resource.nothing_without and not has_value(body, resource, resource.nothing_without):
                self._empty_resources.add(resource.name)
            self._ask_total(resource)
        except FaletlError as error:
            return error
        return None

    def note(self, resource: Resource) -> str:
        """Return a remark about a resource that can be read; usually empty."""
        if resource.name in self._empty_resources:
            return _SENDS_NOTHING.format(column=resource.nothing_without)
        is_refused = resource.proof is not None and self._refused_totals.get(resource.proof.path, False)
        return _TOTAL_REFUSED if is_refused else ""

    def is_accepted(self, metrics: bool) -> bool:
        """Whether fal accepts the key at all: any valid key may read prices."""
        if metrics not in self._accepted:
            try:
                self._ask(PRICES, metrics=metrics)
                self._accepted[metrics] = True
            except FaletlError as error:
                self._accepted[metrics] = not isinstance(error, KeyRefusedError)
        return self._accepted[metrics]

    def _ask(self, resource: Resource, *, metrics: bool) -> bytes:
        """Make all calls of the resource; return the first answer."""
        extra = bounds(self._hour) if resource.window == "day" else {}
        if resource.ids_per_call is None:
            return self._ask_all(resource, extra, metrics)
        for endpoint_id in self._ids[:-1]:
            try:
                return self._ask_all(resource, {**extra, "endpoint_id": (endpoint_id,)}, metrics)
            except NotFoundError:
                continue  # fal may list an endpoint without a price
        return self._ask_all(resource, {**extra, "endpoint_id": (self._ids[-1],)}, metrics)

    def _ask_all(self, resource: Resource, extra: Params, metrics: bool) -> bytes:
        bodies: list[bytes] = []
        is_older_form = False

        def ask(question: Question) -> None:
            params = {**question, **extra}
            bodies.append(self._get(resource.path, params, resource.rows_path, metrics))

        for number in range(len(resource.params)):
            is_older_form = ask_in_either_form(resource, number, ask, is_older=is_older_form)
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
