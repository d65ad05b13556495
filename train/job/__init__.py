"""A training process among others: its device, its signals, and what ends it early."""
