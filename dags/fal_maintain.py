"""### Delete obsolete data, weekly

Deletes superseded landed pages older than FALETL_KEEP_DAYS, snapshots that equal the one before, rows
about runs that ended FALETL_KEEP_OPS_DAYS ago, and files that killed tasks left. If snapshots were
deleted, marts are built and published. Reports and a rebuild give the same as before.

Updates `faletl://warehouse/marts`, `.../reports` and `.../published` if there is a new build.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, WEEKLY, connections, maintain, shown

with DAG("fal_maintain", schedule=WEEKLY, doc_md=__doc__, **DAG_ARGS):
    shown(maintain(connections()[0]))
