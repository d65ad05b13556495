"""Weights on disk: ours, the official ones, published initial weights."""
