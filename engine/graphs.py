"""Steps of few tokens without their launches: recorded once for each size, then replayed by one call.

    a step's batch ──copy──► inputs at fixed addresses, padded to a size ──replay──► hidden states at a fixed address

A step of NeMo is some 400 kernels. At small batches a GPU is done with each sooner than a host has launched the next; a
CUDA graph is the same launches, with the same addresses and numbers, in one. It holds what is long and always the same,
the embedding and all layers. Head and sampler are a dozen launches behind it, which the host makes while the graph
runs: in the graph, each size would keep logits of its own (128 MiB at 256 rows of NeMo), penalties and logprobs would
need sizes too, and the head would compute rows that nobody asks for.

Results lie where the next replay puts its own. The work that reads them is launched before that, on the same stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.ops import AttentionBatch

log = logging.getLogger(__name__)

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Does the work once, so that all it needs is there, and returns what does it again, from and to the same addresses."""

# Up to this many tokens of context, attention of many sequences is not cut into parts (PART_TOKENS of its kernel).
# Beyond, a size has as many parts as its context needs, and those beyond a shorter one are programs that end at once:
# at a factor of 8, a few µs of a layer that reads 64 sequences of 5,000 tokens in some hundred.
SHORT_CONTEXT, CONTEXT_FACTOR = 4096, 8
DRAFT_TOKENS = (16, 32, 64)  # of a step with drafts: whole tiles of rows
# Of a step with prompts or chunks, beside which others decode. Up to 1,024 tokens of NeMo in FP8 an H100 is done with
# the kernels before a host has launched them one by one (measured); beyond, they are work enough.
PROMPT_TOKENS = (128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Size:
    """The most that a recorded step can take: sequences, tokens of all, tokens of one, and a context of one."""

    sequences: int
    tokens: int
    longest: int
    context: int

    def holds(self, batch: AttentionBatch) -> bool:
        return (
            len(batch.context_lens) <= self.sequences
            and len(batch.positions) <= self.tokens
            and batch.max_query_len <= self.longest
            and batch.max_context_len <= self.context
        )


def batch_sizes(most: int) -> Iterator[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96 … up to `most`, which is the last: from 16 on a third of it is padding at
    most; up to 16 rows are one tile and cost the same."""
    size = 1
    while size < most:
        yield size
        if size >= 16 and 3 * size // 2 < most:
            yield 3 * size // 2
        size *= 2
    yield most


def sizes(max_batch_size: int, max_batch_tokens: int, max_draft_tokens: int, max_model_len: int) -> list[Size]:
    """All sizes to record, those that cost least first: each batch with a token of each, with some drafts, and prompts.

    Prompts have short contexts alone: a long one is cut into parts by a look at the batch, which a recording has not.
    """
    contexts = []
    context = SHORT_CONTEXT
    while context < max_model_len:
        contexts.append(context)
        context *= CONTEXT_FACTOR
    contexts.append(max_model_len)
    longest = 1 + max_draft_tokens
    found = []
    for sequences in batch_sizes(max_batch_size):
        found += [Size(sequences, sequences, 1, context) for context in contexts]
        held = 0  # tokens that a smaller size has room for
        for tokens in DRAFT_TOKENS if max_draft_tokens else ():
            if sequences <= tokens and held < sequences * longest:
                found += [Size(sequences, tokens, longest, context) for context in contexts]
                held = tokens
    for tokens in PROMPT_TOKENS:
        if tokens <= max_batch_tokens:
            found.append(Size(min(max_batch_size, tokens), tokens, tokens, contexts[0]))
    return sorted(found, key=lambda size: (size.tokens, size.longest, size.sequences, size.context))


class Graphs:
    """The recorded steps of a decoder, and the memory that all of them read and write.

    Padding is sequences without tokens, and tokens of no sequence and without a slot: they read no page and write none,
    and what is computed for them reaches nobody.

    Args:
        sizes: as `sizes` gives them.
        pages_per_sequence: of the longest context.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, sizes: list[Size], pages_per_sequence: int, record: Record
    ) -> None:
        self._decoder, self._cache, self._sizes, self._record = decoder, cache, sizes, record
        device = decoder.device
        tokens, sequences = max(size.tokens for size in sizes), max(size.sequences for size in sizes)
        self._ids, self._positions, self._slots = torch.zeros(3, tokens, dtype=torch.int64, device=device)
        self._starts = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        self._contexts = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._tables = torch.zeros(sequences, pages_per_sequence, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(tokens, decoder.config.hidden_size, dtype=decoder.dtype, device=device)
        self._replays: dict[Size, Replay] = {}

    @torch.inference_mode()
    def record(self) -> None:
        """Record all sizes, the largest first: the others find room in the memory that it leaves to them."""
        began = time.monotonic()
        for size in reversed(self._sizes):
            self._pad(size, 0, 0)
            self._replays[size] = self._record(partial(self._compute, size))
        log.info("%d step sizes recorded in %.1f s", len(self._sizes), time.monotonic() - began)

    def forward(self, token_ids: Tensor, batch: AttentionBatch) -> Tensor | None:
        """`Decoder.forward` without adapters: [T, hidden_size], until the next call. None = no recorded size holds it.

        Never waits for the device.
        """
        size = next((size for size in self._sizes if size.holds(batch)), None)
        if size is None or size not in self._replays:
            return None
        tokens, sequences, used = len(token_ids), len(batch.context_lens), batch.block_tables.shape[1]
        self._ids[:tokens].copy_(token_ids)
        self._positions[:tokens].copy_(batch.positions)
        self._slots[:tokens].copy_(batch.slots)
        self._starts[:sequences].copy_(batch.query_starts[:-1])
        self._contexts[:sequences].copy_(batch.context_lens)
        self._tables[:sequences, :used].copy_(batch.block_tables)
        self._pad(size, sequences, tokens)
        self._replays[size]()
        return self._hidden[:tokens]

    def _pad(self, size: Size, sequences: int, tokens: int) -> None:
        """All behind so many is padding. The rest may stay what it was: any token and position can be computed."""
        self._slots[tokens : size.tokens].fill_(-1)
        self._starts[sequences : size.sequences + 1].fill_(tokens)

    def _compute(self, size: Size) -> None:
        batch = AttentionBatch(
            positions=self._positions[: size.tokens],
            slots=self._slots[: size.tokens],
            query_starts=self._starts[: size.sequences + 1],
            context_lens=self._contexts[: size.sequences],
            block_tables=self._tables[: size.sequences],
            max_query_len=size.longest,
            max_context_len=size.context,
            query_starts_list=[],  # nothing that a replay could not see change
            context_lens_list=[],
        )
        hidden = self._decoder.forward(self._ids[: size.tokens], batch, self._cache)
        self._hidden[: size.tokens].copy_(hidden)


class CudaRecord:
    """`Record` by CUDA graphs, which share one pool of memory: no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Replay:
        # Kernels are compiled and loaded at their first launch, and libraries take their workspace of a stream: none of
        # it may happen in a capture.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        graph = torch.cuda.CUDAGraph()
        # Waits for the work; other threads may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        replay: Replay = graph.replay
        return replay
