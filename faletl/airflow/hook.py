"""Settings from Airflow's connections. No other module reads connections to fal or the warehouse."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.sdk.log import mask_secret

from faletl.errors import FaletlError, SettingsError

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from faletl.config import Settings
    from faletl.fal.client import FalClient

DEFAULT_CONNECTION = "fal_default"
WAREHOUSE_CONNECTION = "fal_warehouse"


class FalHook(BaseHook):
    """The hook of a connection of type `fal`; without one, settings come from the environment.

    The warehouse comes from a connection `fal_warehouse` of type duckdb or postgres, if there is one
    (README, "Settings").
    """

    conn_name_attr = "fal_conn_id"
    default_conn_name = DEFAULT_CONNECTION
    conn_type = "fal"
    hook_name = "fal.ai"

    def __init__(self, fal_conn_id: str = DEFAULT_CONNECTION) -> None:
        super().__init__()
        self.fal_conn_id = fal_conn_id

    def settings(self) -> Settings:
        """Return settings from the connection; those that it leaves empty come from the environment.

        Raises:
            SettingsError: a value is invalid, or there is no such connection.
        """
        from faletl.config import Settings
        from faletl.redaction import MIN_SECRET_CHARACTERS

        settings = Settings.load(**_connection_settings(self.fal_conn_id))
        for key in (settings.key_for(), settings.key_for(metrics=True)):
            # Airflow masks the whole password only; an answer of fal could repeat half of a key.
            for half in key.split(":", 1) if key else ():
                if len(half) >= MIN_SECRET_CHARACTERS:
                    mask_secret(half)
        return settings

    def get_conn(self) -> FalClient:
        """Return a client of fal's API; close it, or use it in a `with`."""
        from faletl.fal.client import FalClient

        return FalClient(self.settings())

    def test_connection(self) -> tuple[bool, str]:
        """Run `faletl check` for the Test button of the connection form."""
        from faletl.operations.check import check

        try:
            report = check(self.settings())
        except FaletlError as error:
            return False, str(error)
        sentences = [problem.sentence for problem in report.problems]
        sentences += [
            f"{access.resource}: {access.sentence}" for access in report.findings if access.sentence
        ]
        readable = [access.resource for access in report.findings if access.is_readable]
        if readable:
            account = f"account {report.account}: " if report.account else ""
            sentences.insert(0, f"{account}{', '.join(readable)} can be read")
        return report.exit_code == 0, "; ".join(sentences)


def _connection(conn_id: str) -> Connection | None:
    """Return the connection, or None if there is none.

    Raises:
        SettingsError: the environment has the connection, but Airflow cannot read it and ignores it.
    """
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        variable = f"AIRFLOW_CONN_{conn_id.upper()}"
        if not os.environ.get(variable):
            return None
        raise SettingsError(
            f"Airflow cannot read the connection in {variable}; write it as JSON, or as a URI like "
            "fal://key_id:secret@ with each part percent-encoded"
        ) from None


def _connection_settings(conn_id: str) -> dict[str, object]:
    """Return the settings in the connections; empty fields are left out."""
    settings: dict[str, object] = {}
    connection = _connection(conn_id)
    if connection is not None:
        settings = _fal_settings(connection)
    elif conn_id != DEFAULT_CONNECTION:
        raise SettingsError(f"there is no connection {conn_id!r}; create one of type fal")
    warehouse = _connection(WAREHOUSE_CONNECTION)
    if warehouse is not None:
        settings["warehouse"] = _warehouse_url(warehouse)
    return settings


def _fal_settings(connection: Connection) -> dict[str, object]:
    extra = connection.extra_dejson
    if connection.conn_type != "fal":
        raise SettingsError(
            f"the connection {connection.conn_id!r} is of type {connection.conn_type!r}, not fal"
        )
    fields = {
        "key": _as_secret(_key(connection)),
        "api_url": connection.host,
        "metrics_key": _as_secret(extra.get("metrics_api_key")),
        "account": extra.get("account"),
        "rate": extra.get("rate"),
    }
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _key(connection: Connection) -> str:
    """Return the key: the password is the whole key, or the login its id and the password its secret.

    Raises:
        SettingsError: login and password are not a key.
    """
    login, password = ((text or "").strip() for text in (connection.login, connection.password))
    if not login or password.startswith(f"{login}:"):
        return password
    if not password or ":" in login + password:
        raise SettingsError(
            f"the connection {connection.conn_id!r} needs the whole key, key_id:secret, as password; "
            "or the key id alone as login, and the secret alone as password"
        )
    return f"{login}:{password}"


def _as_secret(key: object) -> object:
    """Wrap the key, so that no traceback with local variables shows it if a setting is wrong."""
    from pydantic import SecretStr

    return SecretStr(key) if isinstance(key, str) and key else key


def _warehouse_url(connection: Connection) -> str:
    """Return the SQLAlchemy URL of a warehouse connection.

    A file is the host or, in a URI, the path. For a server, the TLS options of the extra field are used.
    """
    if connection.conn_type == "postgres":
        import sqlalchemy as sa

        options = {k: str(v) for k, v in connection.extra_dejson.items() if k.startswith("ssl")}
        url = sa.URL.create(
            "postgresql",
            username=connection.login,
            password=connection.password,
            host=connection.host,
            port=connection.port,
            database=connection.schema,
            query=options,
        )
        return url.render_as_string(hide_password=False)
    path = connection.host or connection.schema
    if connection.conn_type != "duckdb" or not path:
        raise SettingsError(
            f"the connection {connection.conn_id!r} must be of type postgres, or of type duckdb with "
            "the file's path as host"
        )
    return f"duckdb:///{path}"
