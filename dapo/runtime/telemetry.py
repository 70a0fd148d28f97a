"""Environment variables of the processes we start."""

from __future__ import annotations

# Each of these programs reports its use to its maker by default. MLflow wants exactly `true`.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # With its statistics off Ray 2.60 still reports that they are off; nobody listens on this port.
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
