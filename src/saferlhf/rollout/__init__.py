"""Responses sampled from a policy."""
