"""Metrics of a run: computed, logged, traced."""
