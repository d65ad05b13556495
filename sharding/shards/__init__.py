"""Packed corpora: shards and their index, written, read back, checked and repaired."""
