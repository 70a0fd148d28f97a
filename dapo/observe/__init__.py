"""What happened: the journal, MLflow, the report."""
