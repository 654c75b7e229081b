"""MLflow: what is uploaded, and the process that does it."""
