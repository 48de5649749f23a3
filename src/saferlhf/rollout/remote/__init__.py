"""Servers that speak the OpenAI protocol: a patient client, answers kept on disk, and a judge behind it."""
