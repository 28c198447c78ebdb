"""### Usage, billing events and credits, hourly

Fetches what is due: missing days, today up to its last full hour, and loaded days again at growing
intervals for 90 days, so that late and restated data is found. A manual or backfill run fetches again
every UTC day that its interval touches, each day once per backfill.

Updates `faletl://warehouse/raw/usage`, `.../raw/billing_events` and `.../raw/credits`.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, EVERY_HOUR, HOURLY, connections, dag_id, load_resource

for connection in connections():
    with DAG(dag_id("fal_usage", connection), schedule=HOURLY, doc_md=__doc__, **DAG_ARGS):
        for resource in EVERY_HOUR:
            load_resource(resource, connection)
