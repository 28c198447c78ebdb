"""Provider metadata for Airflow: the connection type `fal` and the fields of its form."""

from __future__ import annotations

from typing import Any

from faletl import __version__
from faletl.resources import KEY_COMMAND


def provider_info() -> dict[str, Any]:
    """Return the metadata for Airflow's entry point `apache_airflow_provider`."""
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
                        "login": "empty if the password is the whole key",
                        "password": "key_id:secret, or the secret alone",
                        "host": "https://api.fal.ai/v1",
                    },
                },
                "conn-fields": {
                    # Airflow hides extra fields by name; this name contains "api_key".
                    "metrics_api_key": {
                        "label": "Metrics key",
                        "description": "Second key, preset READONLY, for analytics and the catalogue; "
                        f"only if the first has preset BILLING. For one key for all: {KEY_COMMAND}",
                        "schema": {"type": ["string", "null"], "format": "password"},
                    },
                    "account": {
                        "label": "Account",
                        "description": "Label of the account. Empty: its present label, or fal's name.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "rate": {
                        "label": "Requests per second",
                        "description": "The most that each task makes; 0 for no limit.",
                        "schema": {"type": ["number", "null"], "minimum": 0},
                    },
                },
            }
        ],
    }
