"""Searching packed images or clips by text."""
