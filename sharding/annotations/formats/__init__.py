"""Annotation files of one form each to records."""
