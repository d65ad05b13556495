"""Checkpoints of a run: written by all ranks, copied, pruned, resumed from."""
