"""Compiled grammars: who has them, who waits for them, and the masks of completions that follow them.

Each is tried in a process of its own (`engine.grammar.trial`) and compiled in a thread, so that no step waits for one,
and none can harm an engine that serves others. Threads share the trie of the vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from llguidance import LLExecutor, LLMatcher

from engine.errors import InvalidRequestError
from engine.grammar.language import compile_grammar, make_tokenizer
from engine.grammar.matcher import FIELD, Matcher
from engine.grammar.trial import NICENESS, Setting, Trial
from engine.request import Grammar, SamplingParams, Vocabulary

log = logging.getLogger(__name__)

COMPILERS = 2  # threads, each with a trial: one slow grammar does not hold up all others
KEPT = 64  # compiled grammars, the latest used
KEPT_BYTES = 2**28  # of all of them


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: LLMatcher
    nbytes: int


@dataclass(slots=True)
class _Known:
    """A grammar on its way, or there. `waiting`: requests that need it and do not have it yet."""

    future: Future[_Compiled]
    waiting: set[str] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Of one that is there."""
        return self.future.result().nbytes if self.future.exception() is None else 0

    @property
    def is_void(self) -> bool:
        """It failed, for a reason that is not the grammar's, and nobody is to learn of it any more."""
        if self.waiting or not self.future.done():
            return False
        error = self.future.exception()
        return error is not None and not isinstance(error, ValueError)


class Grammars:
    """Compiled grammars over one vocabulary. All methods belong to one thread.

    Args:
        vocabulary: its ids beyond `vocab_size` are ignored; those that it lacks never come.
        vocab_size, eos_token_ids: of the model.
        threads: for masks of several completions.
    """

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: tuple[int, ...], threads: int | None = None
    ) -> None:
        self._eos = eos_token_ids
        self._end = vocab_size
        self._width = 4 * -(-(vocab_size + 1) // 32)
        self._masking = LLExecutor(threads)
        self._setting = Setting(vocabulary, vocab_size)
        self._own = threading.local()  # the trial of each thread
        self._trials: list[Trial] = []
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar", initializer=self._begin)
        self._tokenizer = self._threads.submit(make_tokenizer, vocabulary, vocab_size)
        self._known: OrderedDict[Grammar, _Known] = OrderedDict()
        self._waiting: dict[str, SamplingParams] = {}

    @property
    def is_compiling(self) -> bool:
        """Somebody waits for a grammar."""
        return bool(self._waiting)

    def compile(self, request_id: str, params: SamplingParams) -> None:
        """Begin to compile the grammar of a request, unless it is known; `take` has it once it is there."""
        grammar = _grammar_of(params)
        if (known := self._known.get(grammar)) is None or known.is_void:
            known = self._known[grammar] = _Known(self._threads.submit(self._compile, grammar))
        self._known.move_to_end(grammar)
        known.waiting.add(request_id)
        self._waiting[request_id] = params
        self._forget_old()

    def cancel(self, request_id: str) -> None:
        """A request does not need its grammar any more. What nobody waits for is not begun."""
        if (params := self._waiting.pop(request_id, None)) is not None:
            known = self._known[_grammar_of(params)]
            known.waiting.discard(request_id)
            if not known.waiting and known.future.cancel():
                del self._known[_grammar_of(params)]

    def take(self) -> dict[str, Matcher | InvalidRequestError]:
        """What requests have waited for: a matcher at the beginning of the grammar, or why there will be none."""
        taken: dict[str, Matcher | InvalidRequestError] = {}
        for request_id, params in list(self._waiting.items()):
            known = self._known[_grammar_of(params)]
            if known.future.done():
                taken[request_id] = self._outcome(known.future, params)
                del self._waiting[request_id]
                known.waiting.discard(request_id)
        return taken

    def masks(self, asked: Mapping[int, tuple[Matcher, Sequence[int]]]) -> dict[int, bytes]:
        """See `engine.step.Masks`.

        Args:
            asked: by row, where its completion is, and the drafts of its next tokens.
        """
        width = self._width
        places, size = {}, 0
        for row, (_, drafts) in asked.items():
            places[row] = slice(size * width, (size + 1 + len(drafts)) * width)
            size += 1 + len(drafts)
        buffer = bytearray(b"\xff") * (size * width)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        going = {row: each for row, each in asked.items() if each[0].limit is None}  # of others, what comes is dropped
        plain = [(matcher.core, places[row].start // width) for row, (matcher, drafts) in going.items() if not drafts]
        if plain:
            self._masking.unsafe_compute_mask_ptr(plain, address, width, size)
        view = memoryview(buffer)
        for row, (matcher, drafts) in going.items():
            if drafts:
                matcher.masks_behind(drafts, view[places[row]], width)
            matcher.finish_masks(view[places[row]], width, self._end)
        return {row: bytes(view[place]) for row, place in places.items()}

    def close(self) -> None:
        """Nothing is compiled any more, but for what is being compiled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.close()

    def _begin(self) -> None:
        """In each thread, once. Steps go before what it does: Linux keeps a niceness for each thread."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._own.trial = Trial(self._setting)
        self._trials.append(self._own.trial)

    def _compile(self, grammar: Grammar) -> _Compiled:
        """In a thread. Raises ValueError with what is wrong with the grammar."""
        verdict = self._own.trial.judge(grammar)
        if verdict.reason is not None:
            raise ValueError(verdict.reason)
        return _Compiled(compile_grammar(self._tokenizer.result(), grammar), verdict.nbytes)

    def _forget_old(self) -> None:
        """Drop the longest unused, of those that are there and that nobody waits for."""
        idle = {grammar: known for grammar, known in self._known.items() if not known.waiting and known.future.done()}
        nbytes = sum(known.nbytes for known in idle.values())
        for grammar, known in idle.items():
            if len(self._known) <= KEPT and nbytes <= KEPT_BYTES:
                return
            nbytes -= known.nbytes
            del self._known[grammar]

    def _outcome(self, future: Future[_Compiled], params: SamplingParams) -> Matcher | InvalidRequestError:
        try:
            return Matcher(future.result().matcher, params.ends(self._eos), params.min_tokens)
        except ValueError as error:
            reason = str(error)
        except Exception as error:  # ours, or MemoryError: the engine goes on without this grammar
            log.exception("a grammar cannot be compiled")
            reason = "not now, try again later" if isinstance(error, OSError) else type(error).__name__
        return InvalidRequestError(FIELD, f"the {_grammar_of(params).kind} cannot be served: {reason}")


def _grammar_of(params: SamplingParams) -> Grammar:
    assert params.grammar is not None
    return params.grammar
