"""The folder of DAGs as Airflow parses it: cheap, documented, and set up to be run for years."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.conftest import DAGS, Airflow, Warm, environment

pytestmark = pytest.mark.xdist_group("airflow")  # which is imported once a process

HEAVY = {"great_expectations", "pandas", "duckdb", "httpx", "pyarrow", "msgspec", "pydantic_settings"}

DESCRIBE = """
import json, sys
from pathlib import Path
from airflow.configuration import conf
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.serialization.serialized_objects import DagSerialization
from airflow.sdk.exceptions import ParamValidationError

def is_refused(dag, payload):  # as Airflow's server does, for its form, its API and its command line
    try:
        DagSerialization.from_dict(DagSerialization.to_dict(dag)).params.deep_merge(payload).validate()
    except ParamValidationError:
        return True
    return False

folder = Path(conf.get("core", "dags_folder"))
bag = BundleDagBag(dag_folder=folder, bundle_path=folder, bundle_name="dags-folder")
assert not bag.import_errors, bag.import_errors
print(json.dumps({name: {
    "file": Path(dag.fileloc).stem, "doc": dag.doc_md, "tags": sorted(dag.tags), "catchup": dag.catchup,
    "max_active_runs": dag.max_active_runs, "timetable": type(dag.timetable).__name__,
    "deadline": dag.deadline is not None, "params": dag.params.dump(),
    "serialized": len(json.dumps(DagSerialization.to_dict(dag))),
    "tasks": {task.task_id: {
        "doc": task.doc_md, "owner": task.owner, "retries": task.retries, "pool": task.pool,
        "policy": type(task.retry_policy).__name__, "mapped": task.is_mapped,
        "outlets": [outlet.uri for outlet in task.outlets or []],
        "notifies": bool(task.on_failure_callback),
    } for task in dag.tasks},
    "refused": [conf for conf in json.loads(sys.argv[1]) if is_refused(dag, conf)],
} for name, dag in bag.dags.items()}))
"""

PAYLOADS: list[dict[str, Any]] = [
    {"start": "{{ conn.fal_default.password }}"},
    {"start": "{% include '/etc/passwd' %}"},
    {"start": "../../etc/passwd"},
    {"start": "2026-11-01' or 1=1; drop table raw.usage; --"},
    {"start": "2026-11-01\n2026-11-02"},
    {"start": "2026-11-31"},
    {"start": "$(id)"},
    {"start": ""},
    {"start": 20261101},
    {"end": "{{ 1 }}"},
    {"end": "2026-11-01/.."},
    {"end": ["2026-11-01"]},
    {"resources": "usage"},
    {"resources": ["usage", "{{ 1 }}"]},
    {"resources": ["../landing"]},
    {"resources": ["usage; drop table raw.usage"]},
    {"resources": [None]},
    {"resources": {}},
    {"dry_run": "{{ 1 }}"},
    {"dry_run": "false"},
    {"dry_run": 0},
    {"dry_run": None},
]


@pytest.fixture(scope="module")
def dags(warm: Warm, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What stands in the folder, and which payloads each DAG refuses when a run is made."""
    home = tmp_path_factory.mktemp("airflow")
    shutil.copyfile(migrated, home / "airflow.db")
    said = Airflow(home, warm, environment(home)).run(DESCRIBE, json.dumps(PAYLOADS))
    described: dict[str, Any] = json.loads(said.splitlines()[-1])
    return described


def test_the_dags_are_as_a_data_engineer_would_have_them(dags: dict[str, Any]) -> None:
    assert set(dags) == {path.stem for path in DAGS.glob("*.py")}
    assert set(dags) >= {"fal_prices", "fal_usage", "fal_analytics", "fal_spend", "fal_backfill"}
    for name, dag in dags.items():
        assert dag["file"] == name
        assert dag["doc"].startswith("### ")
        assert {"fal", "spend"} <= set(dag["tags"])
        assert (dag["catchup"], dag["max_active_runs"]) == (False, 1)
        for task_id, task in dag["tasks"].items():
            assert task["doc"], task_id
            assert task["owner"] == "faletl"
            assert task["policy"] == "FalRetryPolicy"
            assert task["retries"] >= 3 or task_id.endswith("all_loaded")
            assert task["notifies"]
            is_writer = task_id.rpartition(".")[2] in ("load", "build", "publish", "maintain")
            assert task["pool"] == ("faletl_warehouse" if is_writer else "default_pool")
    for name in ("fal_prices", "fal_usage", "fal_deadline", "fal_maintain"):
        assert dags[name]["timetable"] == "FullHoursTimetable"
    assert dags["fal_analytics"]["timetable"] == "AssetOrTimeSchedule"
    assert dags["fal_deadline"]["deadline"]
    assert set(dags["fal_backfill"]["params"]) == {"start", "end", "resources", "dry_run"}


def test_a_form_takes_dates_and_names_of_resources_and_nothing_else(dags: dict[str, Any]) -> None:
    assert dags["fal_backfill"]["refused"] == PAYLOADS
    assert set(dags["fal_usage"]["params"]) == set()  # whatever a run of it is given, means nothing


def test_extraction_is_mapped_and_each_raw_table_is_an_asset(dags: dict[str, Any]) -> None:
    tasks = {task_id: task for dag in dags.values() for task_id, task in dag["tasks"].items()}
    for resource in ("usage", "billing_events", "credits", "models", "prices", "analytics"):
        assert tasks[f"{resource}.extract"]["mapped"]
        assert tasks[f"{resource}.load"]["outlets"] == [f"faletl://warehouse/raw/{resource}"]
    assert tasks["prices.ask_ahead"]["mapped"]
    assert tasks["publish"]["outlets"] == ["faletl://warehouse/published"]


def test_parsing_the_folder_imports_nothing_heavy_and_opens_nothing(airflow: Airflow) -> None:
    code = f"""
import runpy, sys
from pathlib import Path
import airflow.sdk
from airflow.sdk import task, DAG
by_airflow, opened = set(sys.modules), []
def noted(event, args):
    if event.startswith(("socket.", "sqlite3.")):
        opened.append((event, args))
sys.addaudithook(noted)
for path in sorted(Path({str(DAGS)!r}).glob("*.py")):
    runpy.run_path(str(path))
print(sorted({HEAVY!r} & (set(sys.modules) - by_airflow)))
print(sorted({{"great_expectations", "pandas", "duckdb"}} & set(sys.modules)))
print(opened)
__import__("socket").gethostbyname("127.0.0.1")
print(len(opened))
"""
    done = airflow.cold(code, FALETL_WAREHOUSE="postgresql://127.0.0.1:1/none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == ["[]", "[]", "[]", "1"]
