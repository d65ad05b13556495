"""Repeats rows of the paper's tables: what to fetch, the commands, and the numbers beside the published ones."""
