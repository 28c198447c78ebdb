"""dlt as its documentation advises: REST source, cursor paginator, each day a package that replaces it.

Merge by delete-insert; amounts with a decimal hint; dlt's own retries, quicker than by default.
"""

import os
from datetime import timedelta

os.environ |= {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    "RUNTIME__REQUEST_MAX_ATTEMPTS": "6",
    "RUNTIME__REQUEST_BACKOFF_FACTOR": "0.1",
    "EXTRACT__WORKERS": "4",
    "NORMALIZE__WORKERS": "2",
}

import dlt
from dlt.sources.rest_api import rest_api_source


def day_of(url, day, table, selector, amounts, params, steps):
    """Return the source of one day of a resource, which replaces that day."""
    return rest_api_source(
        {
            "client": {
                "base_url": url,
                "headers": {"Authorization": "Key sandbox-full:not-a-secret"},
                "paginator": {
                    "type": "cursor",
                    "cursor_path": "next_cursor",
                    "cursor_param": "cursor",
                },
            },
            "resources": [
                {
                    "name": table,
                    "write_disposition": {"disposition": "merge", "strategy": "delete-insert"},
                    "merge_key": "day",
                    "max_table_nesting": 0,
                    "columns": {
                        name: {"data_type": "decimal", "precision": 38, "scale": 12} for name in amounts
                    },
                    "endpoint": {
                        "path": f"models/{table.replace('_', '-')}",
                        "data_selector": selector,
                        "params": {
                            "start": f"{day}T00:00:00Z",
                            "end": f"{day + timedelta(days=1)}T00:00:00Z",
                            **params,
                        },
                    },
                    "processing_steps": [steps],
                }
            ],
        },
        name="fal",
    )


def pipeline_to(database):
    """Return a pipeline into a DuckDB file."""
    return dlt.pipeline(
        "fal",
        destination=dlt.destinations.duckdb(database),
        dataset_name="fal",
        pipelines_dir=f"{database}.pipelines",
    )
