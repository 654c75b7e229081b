#!/bin/sh
# Starts MLflow's server with PostgreSQL, served artefacts and passwords; compose.yaml runs it in a container.
# SECRETS is a folder with the files db_password, admin_password and flask_secret. None of them has a default.
set -eu

secrets=${SECRETS:-/run/secrets}
refuse() {
    echo "mlflow-server: $1; make it with: openssl rand -hex 32" >&2
    exit 1
}
secret() {
    test -s "$secrets/$1" || refuse "$secrets/$1: missing or empty"
    tr -d '\n' < "$secrets/$1"
}
db_password=$(secret db_password)
MLFLOW_AUTH_ADMIN_PASSWORD=$(secret admin_password)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret flask_secret)
case $db_password in
    *[!A-Za-z0-9_-]*) refuse "db_password: only letters, digits, _ and - can stand in a URI" ;;
esac
# The password goes into the environment, because every process of the machine can read a command line.
MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://${DB_USER:-mlflow}:$db_password@${DB_HOST:-db}:${DB_PORT:-5432}/${DB_NAME:-mlflow}

umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
cat > "$MLFLOW_AUTH_CONFIG_PATH" << EOF
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = $MLFLOW_BACKEND_STORE_URI
admin_username = ${ADMIN_USER:-admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
EOF
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_BACKEND_STORE_URI MLFLOW_AUTH_CONFIG_PATH
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

exec mlflow server --app-name basic-auth --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" \
    --serve-artifacts --artifacts-destination "${ARTIFACTS:-/artifacts}" --allowed-hosts "$ALLOWED_HOSTS"
