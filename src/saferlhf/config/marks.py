"""Marks on fields of the schema: how a key enters a run's identity (`identity.py`)."""

from __future__ import annotations

OUTSIDE_IDENTITY = {"identity": False}
"""Field metadata: this key does not enter the run's hash."""

CONTENT = {"content": True}
"""Field metadata: this key is a path or locator; it enters the hash by the content it points to."""

IF_GIVEN = {"if_given": True}
"""Field metadata: this key enters the hash where it is not null, so that runs of tasks without it keep theirs."""
