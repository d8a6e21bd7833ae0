"""Collected only in Triton's interpreter, which `../test_triton.py` starts."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
