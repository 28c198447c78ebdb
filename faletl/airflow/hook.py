"""Settings from Airflow's connections: the only place that reads them."""

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
    """What a connection of type `fal` stands for; without one, the environment (README, "Settings").

    The warehouse comes from a connection `fal_warehouse` of type duckdb or postgres, if there is one.
    """

    conn_name_attr = "fal_conn_id"
    default_conn_name = DEFAULT_CONNECTION
    conn_type = "fal"
    hook_name = "fal.ai"

    def __init__(self, fal_conn_id: str = DEFAULT_CONNECTION) -> None:
        super().__init__()
        self.fal_conn_id = fal_conn_id

    def settings(self) -> Settings:
        """Settings from the connection, and for what it leaves open from the environment.

        Raises:
            SettingsError: a value cannot be right, or there is no such connection.
        """
        from faletl.config import Settings
        from faletl.redaction import MIN_SECRET_CHARACTERS

        settings = Settings.load(**_given(self.fal_conn_id))
        for key in (settings.key_for(), settings.key_for(metrics=True)):
            # Airflow masks what the password holds, whole; fal could repeat half of a key.
            for half in key.split(":", 1) if key else ():
                if len(half) >= MIN_SECRET_CHARACTERS:
                    mask_secret(half)
        return settings

    def get_conn(self) -> FalClient:
        """A client of fal's API; close it, or use it in a `with`."""
        from faletl.fal.client import FalClient

        return FalClient(self.settings())

    def test_connection(self) -> tuple[bool, str]:
        """What `faletl check` says, for the button Test of the connection's form."""
        from faletl.operations.check import check

        try:
            checked = check(self.settings())
        except FaletlError as error:
            return False, str(error)
        sentences = [problem.sentence for problem in checked.problems]
        sentences += [f"{one.resource}: {one.sentence}" for one in checked.findings if one.sentence]
        readable = [one.resource for one in checked.findings if one.is_readable]
        if readable:
            whose = f"account {checked.account}: " if checked.account else ""
            sentences.insert(0, f"{whose}{', '.join(readable)} can be read")
        return checked.exit_code == 0, "; ".join(sentences)


def _connection(conn_id: str) -> Connection | None:
    """The connection, or None if there is none.

    Raises:
        SettingsError: the environment names one that Airflow cannot read, and so takes for none.
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


def _given(conn_id: str) -> dict[str, object]:
    """The settings that the connections name; an empty field names none."""
    given: dict[str, object] = {}
    connection = _connection(conn_id)
    if connection is not None:
        given = _fields(connection)
    elif conn_id != DEFAULT_CONNECTION:
        raise SettingsError(f"there is no connection {conn_id!r}; make one of type fal")
    warehouse = _connection(WAREHOUSE_CONNECTION)
    if warehouse is not None:
        given["warehouse"] = _warehouse_url(warehouse)
    return given


def _fields(connection: Connection) -> dict[str, object]:
    extra = connection.extra_dejson
    if connection.conn_type != "fal":
        raise SettingsError(
            f"the connection {connection.conn_id!r} is of type {connection.conn_type!r}, not fal"
        )
    fields = {
        "key": _hidden(_key(connection)),
        "api_url": connection.host,
        "metrics_key": _hidden(extra.get("metrics_api_key")),
        "account": extra.get("account"),
        "rate": extra.get("rate"),
    }
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _key(connection: Connection) -> str:
    """The key: all of it is the password, or its id is the login and its secret the password.

    Raises:
        SettingsError: login and password do not make a key.
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


def _hidden(key: object) -> object:
    """The key so that no traceback with locals shows it, should a setting be wrong."""
    from pydantic import SecretStr

    return SecretStr(key) if isinstance(key, str) and key else key


def _warehouse_url(connection: Connection) -> str:
    """The SQLAlchemy URL of a warehouse's connection.

    A file is the host or, in a URI, the path. Of the extra fields of a server those for TLS are taken.
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
