"""Evaluation: retrieval, question answering, multiple choice, metrics and reports."""
