"""Run DAGs of the folder one after another with `dag.test()`, in the Airflow that the environment names.

Takes a JSON list of {"dag_id", "logical_date" or null, "conf", "mark_success": pattern of tasks that are
not run}; prints, as its last line, a JSON list of {"state", "tasks": {task_id with map index: state}}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from airflow.configuration import conf
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.models.dagrun import DagRun
from airflow.sdk import DAG
from airflow.utils.session import create_session


class Waits(Exception):  # noqa: N818  # no error
    """Nothing is left to be done but to wait: for a retry, or for a sensor."""


def main() -> None:
    """See the module."""
    folder = Path(conf.get("core", "dags_folder"))
    bag = BundleDagBag(dag_folder=folder, bundle_path=folder, bundle_name="dags-folder")
    if bag.import_errors:
        raise SystemExit(str(bag.import_errors))
    results = [tested(bag.dags[one["dag_id"]], one) for one in json.loads(sys.argv[1])]
    sys.stdout.write("\n" + json.dumps(results) + "\n")


def tested(dag: DAG, asked: dict[str, Any]) -> dict[str, Any]:
    """Run one of them, until it ends or waits; whatever becomes of it is told."""
    dag.deadline = None  # dag.test() of Airflow 3.3 fails at the end of a DAG that has one
    at = asked.get("logical_date")
    try:
        with patch("time.sleep", _not_for_dag_test(dag.dag_id)):
            dag.test(
                logical_date=datetime.fromisoformat(at) if at else None,
                run_conf=asked.get("conf") or {},
                mark_success_pattern=asked.get("mark_success"),
            )
    except Waits:
        pass
    state, tasks = _states(dag.dag_id)
    return {"state": state, "tasks": tasks}


def _states(dag_id: str) -> tuple[str, dict[str, str]]:
    """The state of the newest run of a DAG, and of its tasks."""
    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id=dag_id).order_by(DagRun.id.desc()).first()
        assert run is not None
        return str(run.state), {
            f"{ti.task_id}[{ti.map_index}]" if ti.map_index >= 0 else ti.task_id: str(ti.state)
            for ti in run.get_task_instances(session=session)
        }


def _not_for_dag_test(dag_id: str) -> Callable[[float], None]:
    """A `time.sleep` for all but dag.test(), which sleeps a second whenever it finds nothing to run.

    It mostly finds something the next time. Where nothing has moved since it looked before, it waits.
    """
    sleep, before = time.sleep, list[Any]()

    def sleep_or_not(seconds: float) -> None:
        if sys._getframe(1).f_code is not DAG.test.__code__:
            sleep(seconds)
            return
        now = _states(dag_id)
        if [now] == before:
            raise Waits
        before[:] = [now]

    return sleep_or_not


if __name__ == "__main__":
    main()
