"""Examines a cluster and its storage before a job starts."""
