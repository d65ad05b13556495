"""Searches packed images or clips by a text."""
