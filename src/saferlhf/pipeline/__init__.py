"""Stages in order, each a normal run: launcher and runner."""
