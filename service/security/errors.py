"""What keeps a server from being secured as its owner asked for."""

from __future__ import annotations


class SecurityError(Exception):
    """A keys file or certificate cannot be used: the message names the file and what is wrong, never what it holds."""
