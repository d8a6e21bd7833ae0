"""What servers are asked in `bench.peers`: streams of random token ids that all begin at the same moment."""

from __future__ import annotations

import random

import msgspec


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """So many requests at once, all of the same lengths.

    Attributes:
        shared_tokens: of the prompt, the same in all of them, and asked once before the clock runs: a system prompt
            that a server has seen before.
    """

    name: str
    streams: int
    prompt_tokens: int
    new_tokens: int
    shared_tokens: int = 0

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Random token ids above the control tokens that vocabularies begin with."""
        rng = random.Random(f"{seed}/{self.name}/{self.streams}")

        def some(count: int) -> list[int]:
            return [rng.randrange(1000, vocab_size) for _ in range(count)]

        shared = some(self.shared_tokens)
        return [shared + some(self.prompt_tokens - self.shared_tokens) for _ in range(self.streams)]

    def warm_up(self) -> Case:
        """The same shape with other tokens, cut short: pages are touched and code is compiled before the clock runs."""
        return msgspec.structs.replace(self, name=f"warm up {self.name}", new_tokens=min(4, self.new_tokens))


def cases(streams: list[int], prompt_tokens: int, new_tokens: int, long_tokens: int, shared_tokens: int) -> list[Case]:
    """The workload: plain streams, one long prompt, and many streams with a prefix that they share."""
    plain = [Case(name="plain", streams=count, prompt_tokens=prompt_tokens, new_tokens=new_tokens) for count in streams]
    long = Case(name="long prompt", streams=1, prompt_tokens=long_tokens, new_tokens=min(32, new_tokens))
    shared = Case(
        name="shared prefix",
        streams=min(16, max(streams)),
        prompt_tokens=shared_tokens + prompt_tokens // 2,
        new_tokens=min(32, new_tokens),
        shared_tokens=shared_tokens,
    )
    return [*plain, long, shared]
