"""faletl in Airflow 3: connection type, tasks, retry policy, notifier. Only this folder imports Airflow.

The DAGs in `dags/` consist of the tasks in `tasks.py`. Airflow parses DAGs all the time, so these
modules are light: a task imports its work when it runs.
"""

from __future__ import annotations

from pathlib import Path


def dags_folder() -> Path:
    """Return the folder of the DAGs: inside the installed package, next to it in a checkout."""
    installed = Path(__file__).parents[1] / "dags"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "dags"
