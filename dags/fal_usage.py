"""### Usage, billing events and credits, hourly

Reads what is due: days never read, today up to its last full hour, and loaded days again at growing
distances for 90 days, so that late and restated data is found. A run that is started by hand, or belongs
to a backfill, fetches every UTC day anew that its interval touches; a day once a backfill.

Moves `faletl://warehouse/raw/usage`, `.../raw/billing_events` and `.../raw/credits`.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, EVERY_HOUR, HOURLY, connections, dag_id, load_resource

for connection in connections():
    with DAG(dag_id("fal_usage", connection), schedule=HOURLY, doc_md=__doc__, **DAG_ARGS):
        for resource in EVERY_HOUR:
            load_resource(resource, connection)
