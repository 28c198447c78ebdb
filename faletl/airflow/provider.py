"""What Airflow is told about this package: the connection type `fal`, with the fields of its form."""

from __future__ import annotations

from typing import Any

from faletl import __version__
from faletl.resources import KEY_COMMAND


def provider_info() -> dict[str, Any]:
    """The answer to Airflow's entry point `apache_airflow_provider`."""
    return {
        "package-name": "faletl",
        "name": "fal.ai",
        "description": "Know what you spend on fal.ai.",
        "versions": [__version__],
        "connection-types": [
            {
                "connection-type": "fal",
                "hook-class-name": "faletl.airflow.hook.FalHook",
                "hook-name": "fal.ai",
                "ui-field-behaviour": {
                    "hidden-fields": ["port", "schema", "extra"],
                    "relabeling": {"login": "Key id", "password": "Key", "host": "Base URL"},
                    "placeholders": {
                        "login": "empty where the key is given whole",
                        "password": "key_id:secret, or the secret alone",
                        "host": "https://api.fal.ai/v1",
                    },
                },
                "conn-fields": {
                    # Airflow hides fields of the extra by their names: this one holds "api_key".
                    "metrics_api_key": {
                        "label": "Metrics key",
                        "description": "Second key, preset READONLY, for analytics and the catalogue: "
                        f"only where the first has preset BILLING. One key for all: {KEY_COMMAND}",
                        "schema": {"type": ["string", "null"], "format": "password"},
                    },
                    "account": {
                        "label": "Account",
                        "description": "Label of the account; if empty, the one it has, or fal's name.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "rate": {
                        "label": "Requests per second",
                        "description": "At most so many by each task; 0 for no limit.",
                        "schema": {"type": ["number", "null"], "minimum": 0},
                    },
                },
            }
        ],
    }
