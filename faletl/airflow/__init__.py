"""What faletl adds to Airflow 3: connection type, tasks, retry policy, notifier. Alone imports Airflow.

`tasks.py` is what the DAGs in `dags/` are put together from; nothing here is heavy to import, since
Airflow parses DAGs all day: the work is imported when a task runs.
"""

from __future__ import annotations

from pathlib import Path


def dags_folder() -> Path:
    """The DAGs: beside the package in a checkout, inside it when installed."""
    installed = Path(__file__).parents[1] / "dags"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "dags"
