"""Run DAGs of the folder one after another with `dag.test()`, in the Airflow that the environment names.

Takes a JSON list of {"dag_id", "logical_date" or null, "conf"}; prints, as its last line, a JSON list of
{"state", "tasks": {task_id with map index: state}}. A process of its own, as Airflow is global.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from airflow.configuration import conf
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.sdk import DAG


def main() -> None:
    """See the module."""
    folder = Path(conf.get("core", "dags_folder"))
    bag = BundleDagBag(dag_folder=folder, bundle_path=folder, bundle_name="dags-folder")
    if bag.import_errors:
        raise SystemExit(str(bag.import_errors))
    results = [tested(bag.dags[one["dag_id"]], one) for one in json.loads(sys.argv[1])]
    sys.stdout.write("\n" + json.dumps(results) + "\n")


def tested(dag: DAG, asked: dict[str, Any]) -> dict[str, Any]:
    """Run one of them; whatever becomes of it is told."""
    dag.deadline = None  # dag.test() of Airflow 3.3 fails at the end of a DAG that has one
    at = asked.get("logical_date")
    run = dag.test(
        logical_date=datetime.fromisoformat(at) if at else None, run_conf=asked.get("conf") or {}
    )
    tasks = {
        f"{ti.task_id}[{ti.map_index}]" if ti.map_index >= 0 else ti.task_id: str(ti.state)
        for ti in run.get_task_instances()
    }
    return {"state": str(run.state), "tasks": tasks}


if __name__ == "__main__":
    main()
