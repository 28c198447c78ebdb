"""Settings: what is taken, what is refused without being shown, and how the key is hidden."""

from __future__ import annotations

import base64
import json
import logging
import re
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faletl.config import Settings, unknown_variables
from faletl.errors import SettingsError
from faletl.redaction import REDACTED
from faletl.resources import KEY_COMMAND

KEY = "QZJXWVKY-7931:GHQZPLKX4680WVQJZ"
METRICS_KEY = "WWQQJJ-5517:XKXKZPZPVQVQ2246"

PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
KEYS = st.builds(
    "{}:{}".format,
    st.text(alphabet=PRINTABLE.replace(":", ""), min_size=8, max_size=48),
    st.text(alphabet=PRINTABLE, min_size=16, max_size=64),
)


def told_by(error: BaseException) -> str:
    """All that a log or a terminal may show of an error."""
    told = [str(error), repr(error), *traceback.format_exception(error)]
    if isinstance(error, SettingsError):
        told.append(json.dumps(error.as_dict()))
    return "\n".join(told)


def assert_shows_nothing_of(text: str, secret: str) -> None:
    """No four characters in a row."""
    for first in range(len(secret) - 3):
        assert secret[first : first + 4] not in text


def refused(**given: object) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        Settings.isolated(**given)
    assert caught.value.exit_code == 2
    return caught.value


# --- The key --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key", "metrics_key"])
@pytest.mark.parametrize("blanks", ["", " ", "\n", "\r\n", "\t", " \n\n "])
def test_blanks_around_a_key_are_stripped(name: str, blanks: str) -> None:
    kept = getattr(Settings.isolated(**{name: f"{blanks}{KEY}{blanks}"}), name)
    assert kept.get_secret_value() == KEY


@pytest.mark.parametrize("name", ["key", "metrics_key"])
@pytest.mark.parametrize(
    "key",
    [
        KEY.replace(":", ""),
        KEY.replace(":", ":\n"),
        KEY[:6] + "\n" + KEY[6:],
        KEY[:6] + "\r\nX-Evil: 1" + KEY[6:],
        KEY[:-4] + " " + KEY[-4:],
        KEY[:-4] + "\0" + KEY[-4:],
        KEY[:-4] + "\x7f" + KEY[-4:],
        KEY[:-4] + "\N{NO-BREAK SPACE}" + KEY[-4:],
        KEY[:-4] + "\N{ZERO WIDTH SPACE}" + KEY[-4:],
        KEY[:-4] + "é" + KEY[-4:],
        KEY + "\N{CYRILLIC SMALL LETTER A}",
        "Key " + KEY,
        "Key Key " + KEY,
        KEY.split(":")[0] + ":",
        ":" + KEY.split(":")[1],
    ],
)
def test_a_key_that_cannot_be_one_is_refused_and_no_character_of_it_shown(name: str, key: str) -> None:
    error = refused(**{name: key})
    assert str(error).startswith(("FAL_KEY:", "FAL_METRICS_KEY:", f"{name}:"))
    assert f"{len(key)} characters" in str(error)
    assert_shows_nothing_of(told_by(error), KEY)


@pytest.mark.parametrize("key", ["", " ", "\n", ":", " : "])
def test_an_empty_key_is_refused(key: str) -> None:
    refused(key=key)


def test_a_key_in_the_environment_that_cannot_be_one_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAL_KEY", KEY.replace(":", "\n"))
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert "FAL_KEY" in str(caught.value)
    assert_shows_nothing_of(told_by(caught.value), KEY)


@pytest.mark.parametrize("name", ["key", "metrics_key"])
@pytest.mark.parametrize("value", [KEY.encode(), [KEY], {"key": KEY}, 12345678])
def test_a_key_of_another_type_is_not_shown(name: str, value: Any) -> None:
    try:
        made = Settings.isolated(**{name: value})
    except SettingsError as error:
        assert_shows_nothing_of(told_by(error), KEY)
        assert_shows_nothing_of(told_by(error), "12345678")
    else:
        assert_shows_nothing_of(repr(made), KEY)


def test_settings_never_show_a_key(caplog: pytest.LogCaptureFixture) -> None:
    proxy = "http://user:PVQJXZKW@127.0.0.1:8"
    made = Settings.isolated(key=KEY, metrics_key=METRICS_KEY, proxy=proxy)
    caplog.set_level(logging.DEBUG)
    logging.getLogger("test").debug("%s %r %s", made, made, vars(made))
    shown = [
        repr(made),
        str(made),
        f"{made}",
        made.model_dump_json(),
        repr(made.model_dump()),
        repr(made.model_copy()),
        repr(vars(made)),
        repr(list(made)),
        repr(made.key),
        caplog.text,
    ]
    for text in shown:
        for secret in (KEY, METRICS_KEY, "PVQJXZKW"):
            assert_shows_nothing_of(text, secret)


def test_the_metrics_key_reads_metrics_where_there_is_one() -> None:
    both, one = Settings.isolated(key=KEY, metrics_key=METRICS_KEY), Settings.isolated(key=KEY)
    assert (both.key_for(), both.key_for(metrics=True)) == (KEY, METRICS_KEY)
    assert (one.key_for(), one.key_for(metrics=True)) == (KEY, KEY)
    assert Settings.isolated().key_for() is None


def test_a_missing_key_is_told_with_its_variable_and_the_command_that_makes_one() -> None:
    Settings.isolated(key=KEY).require_key()
    with pytest.raises(SettingsError, match=rf"FAL_KEY.*{re.escape(KEY_COMMAND)}"):
        Settings.isolated().require_key()


# --- The URL --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://api.fal.ai/v1", "https://api.fal.ai/v1"),
        ("https://api.fal.ai/v1/", "https://api.fal.ai/v1"),
        (" https://fal.example:8443 \n", "https://fal.example:8443"),
        ("https://169.254.169.254/v1", "https://169.254.169.254/v1"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
        ("http://127.9.9.9", "http://127.9.9.9"),
        ("http://[::1]:8080/v1", "http://[::1]:8080/v1"),
        ("http://localhost:1/v1", "http://localhost:1/v1"),
    ],
)
def test_https_to_any_host_and_http_to_this_machine_are_taken(url: str, kept: str) -> None:
    assert Settings.isolated(api_url=url).api_url == kept


@pytest.mark.parametrize(
    "url",
    [
        "http://api.fal.ai/v1",
        "http://10.0.0.1",
        "http://169.254.169.254/latest",
        "http://0.0.0.0",
        "http://127.0.0.1.example.com",
        "http://localhost.example.com",
        "http://example.com/localhost",
        "http://2130706433",
        "http://[::ffff:10.0.0.1]",
    ],
)
def test_plain_http_to_another_machine_must_be_meant(url: str) -> None:
    assert "FALETL_ALLOW_HTTP" in str(refused(api_url=url))
    assert Settings.isolated(api_url=url, allow_http=True).api_url == url


@pytest.mark.parametrize("allow_http", [False, True])
@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "ftp://127.0.0.1/",
        "unix:///run/docker.sock",
        "javascript:alert(1)",
        "//api.fal.ai/v1",
        "api.fal.ai/v1",
        "https://",
        "https:///v1",
        "https:api.fal.ai",
        "https://[::1",
        "https://user@api.fal.ai",
        "https://user:word@api.fal.ai",
        "https://:word@api.fal.ai",
        "https://127.0.0.1\\@example.com",
        "http://127.0.0.1@example.com",
        "http://127.0.0.1:80@example.com",
        "https://api.fal.ai/v1?x=1",
        "https://api.fal.ai/v1#x",
        "https://bücher.example",
        "https://api.fal.\N{CYRILLIC SMALL LETTER A}i",
        "https://api\N{FULLWIDTH FULL STOP}fal.ai",
        "",
    ],
)
def test_any_other_url_is_refused(url: str, allow_http: bool) -> None:
    refused(api_url=url, allow_http=allow_http)


# --- The other values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("1", 1), ("64MiB", 64 * 2**20), ("1GB", 10**9), ("1.5 KiB", 1536), (4096, 4096)],
)
def test_the_largest_answer_is_a_size_in_bytes(size: str | int, size_bytes: int) -> None:
    assert Settings.isolated(max_body=size).max_body == size_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_body", value) for value in ("-1", "x", "64 XB", "MiB", "1e400")),
        *(("memory", value) for value in ("256", "-1MB", "1GB'; drop table x", "MB", "1 PB", "")),
        *(("parallel", value) for value in (0, 65, -1, "two", "1.5")),
        *(("rate", value) for value in (-1, "nan", "inf", "fast")),
        *(("memory", value) for value in ("0MB", "0.0 GiB")),
        *(("max_body", value) for value in (0, "0MB")),
        *(("first_days", value) for value in (-1, "1.5", "x")),
        *(("lock_seconds", value) for value in (-1, "nan", "inf")),
        *((name, value) for name in ("keep_days", "keep_ops_days") for value in (0, -1, 36_501, "x")),
        *(("account", value) for value in ("", "  ", "a\nb", "a\x1b[31m", "\N{RIGHT-TO-LEFT OVERRIDE}")),
        ("allow_http", "perhaps"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_right_is_refused_by_name(name: str, value: object) -> None:
    told = str(refused(**{name: value}))
    assert told.startswith((f"{name}:", f"{Settings.model_fields[name].validation_alias}:"))


@pytest.mark.parametrize("memory", ["256MB", "1GiB", "1.5 GiB", "512 KB", "1TB"])
def test_memory_is_a_size_that_duckdb_takes(memory: str) -> None:
    assert Settings.isolated(memory=memory).memory == memory


ENVIRONMENT = {
    "FAL_KEY": ("key", KEY),
    "FAL_METRICS_KEY": ("metrics_key", METRICS_KEY),
    "FALETL_API_URL": ("api_url", "https://fal.example"),
    "FALETL_WAREHOUSE": ("warehouse", "duckdb:///other.duckdb"),
    "FALETL_LANDING": ("landing", "elsewhere"),
    "FALETL_ACCOUNT": ("account", "acme"),
    "FALETL_PUBLISH": ("publish", "copy.duckdb"),
    "FALETL_FIRST_DAYS": ("first_days", "7"),
    "FALETL_PARALLEL": ("parallel", "9"),
    "FALETL_RATE": ("rate", "2.5"),
    "FALETL_SCHEMA_PREFIX": ("schema_prefix", "fal_"),
    "FALETL_MAX_BODY": ("max_body", "1MiB"),
    "FALETL_MEMORY": ("memory", "1GB"),
    "FALETL_UNITS": ("units", "units.csv"),
    "FALETL_GATE": ("gate", "0"),
    "FALETL_EXPECTATIONS": ("expectations", "expectations"),
    "FALETL_OWNERS": ("owners", "owners.csv"),
    "FALETL_RUNAWAY_MIN_COST": ("runaway_min_cost", "0.5"),
    "FALETL_RUNAWAY_FACTOR": ("runaway_factor", "7.25"),
    "FALETL_RUNAWAY_ALONE": ("runaway_alone", "99"),
    "FALETL_PROXY": ("proxy", "http://127.0.0.1:9"),
    "FALETL_CA_FILE": ("ca_file", "ca.pem"),
    "FALETL_ALLOW_HTTP": ("allow_http", "1"),
    "FALETL_LOCK_SECONDS": ("lock_seconds", "3"),
    "FALETL_KEEP_DAYS": ("keep_days", "7"),
    "FALETL_KEEP_OPS_DAYS": ("keep_ops_days", "90"),
}


@pytest.fixture
def named_files() -> None:
    """What settings of paths name is there."""
    for name in ("units.csv", "owners.csv", "ca.pem"):
        Path(name).touch()
    Path("expectations").mkdir()


@pytest.mark.parametrize("name", ["units", "owners", "ca_file", "expectations"])
def test_a_path_that_leads_nowhere_is_refused_by_name(name: str) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    for path in ("none", "folder" if name != "expectations" else "file"):
        told = str(refused(**{name: Path(path)}))
        assert told.startswith(f"{Settings.model_fields[name].validation_alias}: there is no such ")


@pytest.mark.parametrize("prefix", ["Fal_", "1_", "pg_fal", "fal-", 'f"', "f;", "fäl_", "a" * 33, " "])
def test_a_prefix_that_would_have_to_be_quoted_is_refused(prefix: str) -> None:
    assert "FALETL_SCHEMA_PREFIX: must be at most 32" in str(refused(schema_prefix=prefix))


def test_a_landing_that_is_a_file_is_refused() -> None:
    Path("file").touch()
    assert "FALETL_LANDING: is a file" in str(refused(landing="file"))


def test_a_variable_that_is_no_setting_is_found_with_what_may_be_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FALETL_WAREHOSUE", "FALETL_QQQQQQQQ", "FALETL_CONNECTIONS", "FALETL_OWNER", "FALETLX"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == {"FALETL_WAREHOSUE": "FALETL_WAREHOUSE", "FALETL_QQQQQQQQ": None}


def test_every_setting_has_a_variable_of_its_own_here() -> None:
    assert {name for name, _ in ENVIRONMENT.values()} == set(Settings.model_fields)


@pytest.mark.usefixtures("named_files")
@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_a_variable_is_read_and_what_is_given_wins_and_isolated_settings_ignore_it(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value = ENVIRONMENT[variable]
    default = getattr(Settings.load(), name)
    meant = getattr(Settings.isolated(**{name: value}), name)
    assert meant != default

    monkeypatch.setenv(variable, value)
    assert getattr(Settings.load(), name) == meant
    assert getattr(Settings.isolated(), name) == default
    assert getattr(Settings.load(**{name: default}), name) == default


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_an_empty_variable_counts_as_unset(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "")
    assert Settings.load() == Settings.isolated()


def test_a_bad_variable_is_refused_by_a_name_that_leads_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FALETL_PARALLEL", "many")
    with pytest.raises(SettingsError, match="FALETL_PARALLEL"):
        Settings.load()


def test_other_variables_and_dotenv_files_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FALETL_KEY", "FALETL_SECRET", "FALETL_METRICS_KEY", "FAL_API_URL"):
        monkeypatch.setenv(name, "77")
    Path(".env").write_text(f"FAL_KEY={KEY}\nFALETL_PARALLEL=7\n", encoding="utf-8")
    assert Settings.load() == Settings.isolated()


# --- Redaction ------------------------------------------------------------------------------------


def base64_at(lead: int, text: str, tail: bytes) -> bytes:
    """Base64 of a longer text in which `text` begins `lead` bytes after a border of three."""
    return base64.b64encode(b"\xfb" * lead + text.encode() + tail)


@given(key=KEYS, before=st.binary(max_size=20), after=st.binary(max_size=20))
def test_the_whole_key_is_hidden_wherever_it_stands(key: str, before: bytes, after: bytes) -> None:
    made = Settings.isolated(key=key)
    for form in (key.encode(), quote(key, safe="").encode(), key.encode() * 2):
        assert key.encode() not in made.redact_bytes(before + form + after)
    assert made.redact_bytes(key.encode()) == REDACTED.encode()
    assert made.redact(f"Authorization: Key {key}\n") == f"Authorization: Key {REDACTED}\n"


@given(key=KEYS)
def test_the_secret_half_is_hidden_alone_and_percent_encoded(key: str) -> None:
    made, secret = Settings.isolated(key=key), key.split(":", 1)[1]
    assert secret.encode() not in made.redact_bytes(f"<{secret}>".encode())
    coded = quote(secret, safe="")
    assert secret not in unquote(made.redact(f"?key={coded}&x"))


@given(
    key=KEYS,
    lead=st.integers(0, 2),
    scheme=st.sampled_from(["", "Key ", "key=", "x"]),
    tail=st.text(alphabet="\x01\x02\xe9", max_size=4).map(str.encode),  # in no key, unlike "0", say
)
def test_base64_of_a_key_gives_no_more_than_its_edges_away_in_any_alignment(
    key: str, lead: int, scheme: str, tail: bytes
) -> None:
    made, secret = Settings.isolated(key=key), key.split(":", 1)[1]
    for text, hidden in ((scheme + key, key), (scheme + secret, secret)):
        left, mark, right = made.redact_bytes(base64_at(lead, text, tail)).partition(b"[key]")
        assert mark
        # What is left of the key on either side is what shares a group of four with a neighbour.
        known = lead + len(scheme)
        assert len(left) * 3 // 4 - known <= 3
        assert len(right) <= 4 * ((len(tail) + 2) // 3 + 2)
        assert_shows_nothing_of(decoded(left) + "\n" + decoded_end(right), hidden)


def decoded(start: bytes) -> str:
    """The text of the first groups of a base64 text."""
    return base64.b64decode(start[: len(start) // 4 * 4]).decode("latin-1")


def decoded_end(end: bytes) -> str:
    """The text of the last groups of a base64 text."""
    return base64.b64decode(end[len(end) % 4 :]).decode("latin-1")


@pytest.mark.parametrize("lead", range(3))
def test_a_basic_header_of_each_alignment_is_hidden(lead: int) -> None:
    made = Settings.isolated(key=KEY, metrics_key=METRICS_KEY)
    for key in (KEY, METRICS_KEY):
        coded = base64_at(lead, f"Key {key}", b" and more").decode()
        shown = made.redact(f'{{"header": "{coded}"}}')
        assert REDACTED in shown
        for first in range(len(coded) - 12):
            if coded[first : first + 12] in shown:
                assert first < 8 or first > len(coded) - 28


@given(key=KEYS, metrics_key=KEYS, text=st.text(max_size=60))
def test_both_keys_are_hidden_in_one_text(key: str, metrics_key: str, text: str) -> None:
    made = Settings.isolated(key=key, metrics_key=metrics_key)
    shown = made.redact(f"{text}{key} {metrics_key}{text}{metrics_key}")
    assert key not in shown
    assert metrics_key not in shown


@given(st.binary(max_size=200))
def test_a_body_without_the_key_is_left_as_it_is(body: bytes) -> None:
    assert Settings.isolated(key=KEY, metrics_key=METRICS_KEY).redact_bytes(body) == body
    assert Settings.isolated().redact_bytes(body + KEY.encode()) == body + KEY.encode()


def test_the_id_of_a_key_is_data_in_answers_and_hidden_in_what_is_told() -> None:
    made = Settings.isolated(key=KEY)
    key_id, _, secret = KEY.partition(":")
    row = f'{{"api_key_id": "{key_id}", "cost_total": 1}}'  # spend of the very key that asks for it
    assert made.redact_bytes(row.encode()) == row.encode()
    assert made.redact_bytes(f"Key {key_id}:{secret} or {secret}".encode()) == b"Key [key] or [key]"
    assert made.redact(f"no such key: {key_id}") == f"no such key: {REDACTED}"


@pytest.mark.parametrize("secret", ["SECRET34", "SECRET345", "SECRET3456"])
def test_of_base64_of_the_key_alone_only_the_last_group_is_left(secret: str) -> None:
    coded = base64.b64encode(f"QZJXWVKY-7931:{secret}".encode()).decode()
    made = Settings.isolated(key=f"QZJXWVKY-7931:{secret}")
    assert made.redact(f"<{coded}>") == f"<{REDACTED}{coded[-4:]}>"
    assert made.redact(f"<{secret}>") == f"<{REDACTED}>"  # eight characters suffice


def test_the_login_of_a_proxy_is_hidden_though_there_is_no_second_key() -> None:
    proxy = "http://user:PVQJXZKW@127.0.0.1:8"
    shown = Settings.isolated(key=KEY, proxy=proxy).redact(f"no answer from {proxy} for {KEY}")
    assert shown == f"no answer from {REDACTED} for {REDACTED}"


def test_a_short_secret_does_not_hide_innocent_words() -> None:
    made = Settings.isolated(key="id:image")
    assert made.redact("2 images of id 7") == "2 images of id 7"
    assert made.redact("Key id:image") == f"Key {REDACTED}"


def test_text_that_is_no_unicode_can_be_redacted() -> None:
    assert KEY not in Settings.isolated(key=KEY).redact(f"\ud800{KEY}\udfff")


def test_a_field_is_never_read_from_a_variable_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        if name.upper() != str(Settings.model_fields[name].validation_alias):
            monkeypatch.setenv(name.upper(), "77")
    assert Settings.load() == Settings.isolated()
