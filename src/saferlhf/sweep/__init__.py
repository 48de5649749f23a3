"""Sweeps: many runs of one command, `train.py -m`, each a process of its own; see `command.py`."""
