"""Tasks, judges, metrics and the report."""
