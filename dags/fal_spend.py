"""### Spend per endpoint and unit, after every load

Builds staging, marts and reports for the days that changed and checks them in the same transaction, then
shows them to readers in one step. Runs when any raw table was updated.

Updates `faletl://warehouse/marts`, `.../reports` and `.../published`; schedule your own DAGs on
the last.
"""

from airflow.sdk import DAG, AssetAny

from faletl.airflow.tasks import DAG_ARGS, RAW, build, connections, publish

with DAG("fal_spend", schedule=AssetAny(*RAW.values()), doc_md=__doc__, **DAG_ARGS):
    build(connections()[0]) >> publish(connections()[0])
