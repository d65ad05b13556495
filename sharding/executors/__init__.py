"""Builds shards: in local processes, on a Ray cluster, or as one of several jobs."""
