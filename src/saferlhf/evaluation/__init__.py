"""Evaluation: scores in, metrics with intervals, tables and reports out."""
