"""Which pages a sequence can have without computing them: a chain of keys, one for each page full of known tokens.

    root = H(adapter, salt)     key of page 0 = H(root, its tokens)     key of page i = H(key of page i - 1, its tokens)

Keys and values at a position depend on all tokens up to it, on the weights, and on nothing else: equal keys mean equal
contents. The root keeps apart what must not meet: other weights (the number of a loaded adapter, not its name, which
may come to mean another one) and other tenants (the salt: by timing a hit one could learn what another has asked). H is
BLAKE2b of 256 bits (RFC 7693), so that nobody can make two texts that share a key.

A page gets its key when the step that fills it is planned, not when it is done: a step writes the keys and values of
all its tokens, layer by layer, before any of them is attended to (`engine.ops.interface`). So requests that arrive
together share what the first of them is about to compute.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b


class Prefix:
    """The keys of one sequence, made when they are first needed. Its tokens are only ever appended to."""

    def __init__(self, tokens: list[int], page_size: int, salt: str, adapter: int | None) -> None:
        """`tokens` is the sequence's own list, and grows with it."""
        self._tokens = tokens
        self._page_size = page_size
        # A number has no colon in it, so that no salt looks like an adapter.
        root = f"{'' if adapter is None else adapter}:{salt}"
        self._keys = [blake2b(root.encode(errors="surrogatepass"), digest_size=32).digest()]

    def key(self, page: int) -> bytes:
        """Of page number `page` of the sequence, all of whose tokens are known."""
        size = self._page_size
        while len(self._keys) <= page + 1:
            start = (len(self._keys) - 1) * size
            tokens = array("q", self._tokens[start : start + size])
            assert len(tokens) == size
            self._keys.append(blake2b(self._keys[-1] + tokens.tobytes(), digest_size=32).digest())
        return self._keys[page + 1]
