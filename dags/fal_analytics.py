"""### Requests, errors and durations, daily and whenever usage was loaded

Reads analytics of every endpoint that was used in the 90 days before, and weekly of fal's whole
catalogue: requests that only fail leave no usage. Left out, with a sentence in the log, where the key
may not read it. Runs by hand and backfills fetch the days that their interval touches, a day once a
backfill.

Moves `faletl://warehouse/raw/analytics`.
"""

from airflow.sdk import DAG, AssetOrTimeSchedule

from faletl.airflow.tasks import AFTER_USAGE, DAG_ARGS, DAILY, RAW, connections, dag_id, load_resource

# Endpoints to ask for are those that were used; the days of its own are what a backfill goes by.
SCHEDULE = AssetOrTimeSchedule(timetable=DAILY, assets=[RAW["usage"]])

for connection in connections():
    with DAG(dag_id("fal_analytics", connection), schedule=SCHEDULE, doc_md=__doc__, **DAG_ARGS):
        for resource in AFTER_USAGE:
            load_resource(resource, connection)
