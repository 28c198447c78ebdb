"""The warehouse: what every database must provide, and which module provides it.

The rest of faletl speaks SQL through SQLAlchemy and never asks which database it has; what differs
between databases is in a module of each (duckdb.py, postgres.py), behind one protocol (protocol.py).
"""

from __future__ import annotations

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import SettingsError
from faletl.warehouse.protocol import Warehouse


def open_warehouse(settings: Settings) -> Warehouse:
    """Return the warehouse that FALETL_WAREHOUSE names; raise SettingsError for an unsupported URL."""
    try:
        url = sa.make_url(settings.warehouse)
        kind = url.get_backend_name()
    except sa.exc.ArgumentError:
        kind = ""
    if kind == "duckdb":
        from faletl.warehouse.duckdb import DuckDBWarehouse

        return DuckDBWarehouse(settings, url)
    if kind == "postgresql":
        from faletl.warehouse.postgres import PostgresWarehouse

        return PostgresWarehouse(settings, url)
    problem = f"faletl does not support {kind!a}" if kind else "this is not an SQLAlchemy URL"
    raise SettingsError(
        f"FALETL_WAREHOUSE: {problem}; use duckdb:///path/to/file.duckdb or "
        "postgresql://user:password@host/database"
    )
