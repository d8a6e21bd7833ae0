"""What can go wrong with models on disk and on the way there: one line that says what to do."""

from __future__ import annotations


class StoreError(Exception):
    """A model cannot be found, fetched or kept. The message is one line for the person at the terminal."""
