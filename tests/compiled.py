"""The C++ kernels for tests that are about them."""

from __future__ import annotations

import pytest

from engine.ops import Kernels, load_kernels, native


def compiled(threads: int, architecture: str = "native") -> Kernels:
    """Skips the test where no compiler is, and fails it where kernels do not compile: an engine would go on without."""
    if native.find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    found = load_kernels(threads, architecture=architecture)
    assert found is not None, "the kernels do not compile"
    return found
