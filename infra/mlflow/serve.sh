#!/bin/sh
# An MLflow server for several machines. It stores runs in a SQL database and artifacts on S3.
#   BACKEND=postgresql://user@host/mlflow ARTIFACTS=s3://bucket/mlflow infra/mlflow/serve.sh
# Set MLFLOW_TRACKING_URI=http://host:5000 for the jobs. If it is unset, they write to runs/mlflow.db.
set -eu
: "${BACKEND:=sqlite:///runs/mlflow.db}" "${ARTIFACTS:=runs/mlflow-artifacts}" "${HOST:=127.0.0.1}"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
exec .venv/bin/mlflow server --backend-store-uri "$BACKEND" --artifacts-destination "$ARTIFACTS" \
    --host "$HOST" --port "${PORT:-5000}" --workers 1
