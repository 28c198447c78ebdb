"""Settings. Only this module reads the environment, keeps the key and redacts it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import pydantic
from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from faletl.errors import SettingsError
from faletl.invented import DEMO_MARK, KEYS
from faletl.redaction import without
from faletl.resources import MAKE_A_KEY

Threshold = Annotated[Decimal, Field(gt=0, max_digits=26, decimal_places=12)]
"""An amount above zero that fits a column of amounts exactly."""

LONGEST_LABEL = 200
"""The largest number of characters of an account's label."""

_PREFIX = "(?!pg_)[a-z_][a-z0-9_]{0,31}"
"""The prefix of schema names: an identifier that no database has to quote."""

_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_Days = Annotated[int, Field(ge=1, le=36_500)]

_OF_AIRFLOW = ("FALETL_CONNECTIONS", "FALETL_OWNER")
"""Variables that DAGs read (docs/airflow.md)."""

FINGERPRINT = "sha256$"
"""How the fingerprint of a key begins, and no label does: either may be in the same place."""

_URL = re.compile(
    r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\.?)"
    r"(:(?P<port>\d{1,5}))?(/[A-Za-z0-9._~/-]*)?"
)

_OBJECTS = re.compile(
    r"(?!file:|local:|https?:)[a-z][a-z0-9+.-]*://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._~=+/-]*)?"
)


class Settings(BaseSettings):
    """All settings of a run, from environment variables (README, "Settings").

    Raises:
        SettingsError: a value is not valid. The message never shows a value, only its name.
    """

    model_config = SettingsConfigDict(
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        env_ignore_empty=True,
    )

    key: SecretStr | None = Field(None, validation_alias="FAL_KEY")
    metrics_key: SecretStr | None = Field(None, validation_alias="FAL_METRICS_KEY")
    api_url: str = Field("https://api.fal.ai/v1", validation_alias="FALETL_API_URL")
    warehouse: str = Field("duckdb:///faletl.duckdb", validation_alias="FALETL_WAREHOUSE", repr=False)
    schema_prefix: str = Field("", validation_alias="FALETL_SCHEMA_PREFIX")
    landing: str = Field("landing", validation_alias="FALETL_LANDING")
    account: str | None = Field(None, validation_alias="FALETL_ACCOUNT")
    publish: str | None = Field(None, validation_alias="FALETL_PUBLISH")
    first_days: Annotated[int, Field(ge=0, le=36_500)] = Field(30, validation_alias="FALETL_FIRST_DAYS")
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(4, validation_alias="FALETL_PARALLEL")
    rate: _Finite = Field(5, validation_alias="FALETL_RATE")
    max_body: Annotated[ByteSize, Field(gt=0)] = Field(
        ByteSize(64 * 2**20), validation_alias="FALETL_MAX_BODY"
    )
    memory: str = Field("256MB", validation_alias="FALETL_MEMORY")
    units: Path | None = Field(None, validation_alias="FALETL_UNITS")
    gate: bool = Field(True, validation_alias="FALETL_GATE")
    expectations: Path | None = Field(None, validation_alias="FALETL_EXPECTATIONS")
    owners: Path | None = Field(None, validation_alias="FALETL_OWNERS")
    runaway_min_cost: Threshold = Field(Decimal(10), validation_alias="FALETL_RUNAWAY_MIN_COST")
    runaway_factor: Threshold = Field(Decimal(50), validation_alias="FALETL_RUNAWAY_FACTOR")
    runaway_alone: Threshold = Field(Decimal(1000), validation_alias="FALETL_RUNAWAY_ALONE")
    proxy: SecretStr | None = Field(None, validation_alias="FALETL_PROXY")
    ca_file: Path | None = Field(None, validation_alias="FALETL_CA_FILE")
    allow_http: bool = Field(False, validation_alias="FALETL_ALLOW_HTTP")
    lock_seconds: _Finite = Field(120, validation_alias="FALETL_LOCK_SECONDS")
    keep_days: _Days = Field(30, validation_alias="FALETL_KEEP_DAYS")
    keep_ops_days: _Days = Field(400, validation_alias="FALETL_KEEP_OPS_DAYS")

    @classmethod
    def load(cls, **overrides: object) -> Self:
        """Return the settings of the environment with `overrides`; empty variables are unset."""
        try:
            # Only by the variable's name: a field's own name, say API_URL, must not count as a variable.
            # The type is ignored because pydantic converts the values.
            return cls(**{_variable(name): value for name, value in overrides.items()})  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            reason = first["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{name}: {reason}") from None

    @classmethod
    def isolated(cls, **overrides: object) -> Self:
        """Return the default settings with `overrides`, whatever the environment contains."""
        fields = cls.model_fields.items()
        defaults = {name: field.default for name, field in fields if name not in overrides}
        return cls.load(**defaults, **overrides)

    @field_validator("key", "metrics_key")
    @classmethod
    def _key_is_well_formed(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        text = key.get_secret_value().strip()
        if not re.fullmatch(r"[!-9;-~]+:[!-~]+", text):
            raise ValueError(
                f"a fal key looks like key_id:secret, in printable ASCII without blanks; "
                f"these {len(text)} characters do not (they are not shown)"
            )
        return SecretStr(text)

    @field_validator("api_url")
    @classmethod
    def _url_is_plain(cls, url: str) -> str:
        match = _URL.fullmatch(url.strip())
        if match is None or int(match["port"] or 0) > 65535:
            raise ValueError(
                "must be a URL such as https://api.fal.ai/v1: a plain ASCII host, no user, password, "
                "query or fragment"
            )
        return url.strip().rstrip("/")

    @field_validator("schema_prefix")
    @classmethod
    def _prefix_needs_no_quotes(cls, prefix: str) -> str:
        if prefix and not re.fullmatch(_PREFIX, prefix):
            raise ValueError(
                "must be at most 32 of a-z, 0-9 and _, such as fal_, and must not begin with a digit or "
                "with pg_, which is reserved for PostgreSQL"
            )
        return prefix

    @field_validator("landing")
    @classmethod
    def _landing_is_a_location(cls, landing: str) -> str:
        if ":/" in landing and not _OBJECTS.fullmatch(landing):
            raise ValueError(
                "must be a folder, or a URL such as s3://bucket/prefix: no user, password, query or "
                "fragment; credentials come from the environment, as for AWS's own tools"
            )
        if Path(landing).is_file():
            raise ValueError("is a file, but must be a folder")
        return landing

    @field_validator("units", "owners", "ca_file")
    @classmethod
    def _file_is_there(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError("there is no such file")
        return path

    @field_validator("expectations")
    @classmethod
    def _folder_is_there(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("there is no such folder")
        return path

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, memory: str) -> str:
        if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?([KMGT]i?B)", memory):
            raise ValueError("must be a size for DuckDB, such as 256MB")
        return memory

    @field_validator("account")
    @classmethod
    def _account_is_a_label(cls, account: str | None) -> str | None:
        if account is not None and not is_label(account):
            raise ValueError(f"must be a printable label of at most {LONGEST_LABEL} characters")
        return account

    @model_validator(mode="after")
    def _plain_http_is_allowed(self) -> Self:
        parts = urlsplit(self.api_url)
        if parts.scheme == "http" and not self.allow_http and not _is_loopback(parts.hostname or ""):
            raise ValueError(
                "FALETL_API_URL: plain http would show the key to the network; use https, "
                "or set FALETL_ALLOW_HTTP=1 to allow it"
            )
        return self

    @field_validator("proxy")
    @classmethod
    def _proxy_is_http(cls, proxy: SecretStr | None) -> SecretStr | None:
        if proxy is not None and not proxy.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("must be an http:// or https:// URL")
        return proxy

    @property
    def thresholds(self) -> dict[str, Decimal]:
        """The amounts that the models compare with, by name."""
        names = ("runaway_min_cost", "runaway_factor", "runaway_alone")
        return {name: getattr(self, name) for name in names}

    def key_for(self, *, metrics: bool = False) -> str | None:
        """Return the key for this kind of data; None where no key is set."""
        key = (self.metrics_key if metrics else None) or self.key
        return key.get_secret_value() if key else None

    def fingerprint(self) -> str:
        """Return a new fingerprint of the id of FAL_KEY: salted, so that no two are equal."""
        salt = secrets.token_hex(16)
        return f"{FINGERPRINT}{salt}${_hashed(salt, self.key)}"

    def has_fingerprint(self, fingerprint: str, *, metrics: bool = False) -> bool:
        """Whether it is a fingerprint of the id of FAL_KEY, or with `metrics` of FAL_METRICS_KEY."""
        key = self.metrics_key if metrics else self.key
        _, salt, digest = fingerprint.split("$")
        return key is not None and hmac.compare_digest(digest, _hashed(salt, key))

    @property
    def _is_of_demo(self) -> bool:
        """Whether the current folder, with the warehouse in it, belongs to a demo."""
        return self.warehouse == _default("warehouse") and Path(DEMO_MARK).exists()

    @property
    def has_sandbox_key(self) -> bool:
        """Whether FAL_KEY is one of the sandbox's own keys."""
        return self.key is not None and self.key.get_secret_value() in KEYS

    def key_name(self, *, metrics: bool = False) -> str:
        """Return the name of the setting that this key comes from."""
        return "FAL_METRICS_KEY" if metrics and self.metrics_key else "FAL_KEY"

    def require_key(self) -> None:
        """Raise SettingsError if FAL_KEY is not set, or if fal would be asked in a demo's folder."""
        if self._is_of_demo and (self.key is None or self.api_url == _default("api_url")):
            raise SettingsError(
                "this folder belongs to faletl demo, and its account is invented: start faletl sandbox "
                "in another terminal, and set FALETL_API_URL and FAL_KEY as it prints them"
            )
        if self.key is None:
            raise SettingsError(f"FAL_KEY is not set; {MAKE_A_KEY}, and set FAL_KEY=key_id:secret")

    def redact(self, text: str) -> str:
        """Return the text without our keys, or halves of them, in any form of an echo."""
        encoded = text.encode("utf-8", "surrogatepass")
        return without(encoded, self._secrets(with_ids=True)).decode("utf-8", "replace")

    def redact_bytes(self, body: bytes) -> bytes:
        """Return an answer of fal without our secrets; ids of keys stay, because fal bills by them."""
        return without(body, self._secrets(with_ids=False))

    def _secrets(self, *, with_ids: bool) -> Iterator[str]:
        """Yield the keys and their secret halves."""
        for secret in (self.key, self.metrics_key, self.proxy):
            if secret is not None:
                whole = secret.get_secret_value()
                key_id, _, half = whole.partition(":")
                yield from (whole, half, key_id) if with_ids else (whole, half)


def _hashed(salt: str, key: SecretStr | None) -> str:
    assert key is not None  # noqa: S101  # the caller has checked it
    return hashlib.sha256(f"{salt}{key.get_secret_value().partition(':')[0]}".encode()).hexdigest()


def unknown_variables() -> Mapping[str, str | None]:
    """Return unknown FALETL_ variables of the environment, each with the most similar known name."""
    known = [*map(_variable, Settings.model_fields), *_OF_AIRFLOW]
    unknown = sorted(name for name in os.environ if name.startswith("FALETL_") and name not in known)
    return {name: next(iter(get_close_matches(name, known, n=1)), None) for name in unknown}


def is_label(text: str) -> bool:
    """Whether the text is a valid label of an account."""
    is_text = bool(text.strip()) and text.isprintable() and len(text) <= LONGEST_LABEL
    return is_text and not text.startswith(FINGERPRINT)


def _default(field: str) -> object:
    return Settings.model_fields[field].default


def _variable(field: str) -> str:
    return str(Settings.model_fields[field].validation_alias)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
