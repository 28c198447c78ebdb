"""### Requests, errors and durations, daily and whenever usage was loaded

Fetches analytics of every endpoint that was used in the 90 days before, and weekly of fal's whole
catalogue, because requests that only fail leave no usage. If the key may not read analytics, the log
says so and they are skipped. Manual runs and backfills fetch the days that their interval touches, each
day once per backfill.

Updates `faletl://warehouse/raw/analytics`.
"""

from airflow.sdk import DAG, AssetOrTimeSchedule

from faletl.airflow.tasks import AFTER_USAGE, DAG_ARGS, DAILY, RAW, connections, dag_id, load_resource

# Usage decides which endpoints to fetch; a backfill needs the daily intervals.
SCHEDULE = AssetOrTimeSchedule(timetable=DAILY, assets=[RAW["usage"]])

for connection in connections():
    with DAG(dag_id("fal_analytics", connection), schedule=SCHEDULE, doc_md=__doc__, **DAG_ARGS):
        for resource in AFTER_USAGE:
            load_resource(resource, connection)
