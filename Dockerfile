FROM apache/airflow:3.3.2-python3.12

# A new named volume takes owner and mode of the folder it is mounted on: no container has to start as root.
USER 0
RUN install --directory --owner=50000 --group=0 --mode=0770 \
    /data/landing /data/warehouse "${AIRFLOW_HOME}/auth"
USER 50000

# Airflow's constraints are meant for its own installation alone, and pin things that it does not even need.
# So pip is told to keep Airflow's version, leaves alone whatever fits, and checks that all still fits together.
RUN --mount=type=bind,target=/src \
    pip install --no-cache-dir "apache-airflow==${AIRFLOW_VERSION}" "/src[postgres,s3]" \
    && pip check

COPY dags ${AIRFLOW_HOME}/dags
