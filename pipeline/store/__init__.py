"""MLflow: where runs are written and found again."""
