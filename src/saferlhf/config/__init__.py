"""Structured configuration: schema, validation, defaults that depend on other keys, run identity."""
