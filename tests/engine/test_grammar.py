"""Grammars by themselves: which tokens a mask allows, where texts end, what is refused and how fast."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.grammar import HOSTILE
from engine.errors import InvalidRequestError
from engine.grammar import compiler
from engine.grammar import trial as trial_module
from engine.grammar.compiler import COMPILERS, KEPT, Grammars
from engine.grammar.language import MOST_REASON, one_line
from engine.grammar.matcher import Matcher
from engine.grammar.trial import Setting, Trial, Verdict
from engine.request import MAX_GRAMMAR, Grammar, SamplingParams, Vocabulary
from tests.engine.grammars import CALL, EOS, SIZE, VOCABULARY, WANTED, Passed, bits, compiled

SHOWN = VOCABULARY.tokens
PATIENCE = 60.0  # seconds, for what takes a moment on a machine that has one to spare
ORDINARY = [token for token in range(len(SHOWN)) if SHOWN[token] and token not in VOCABULARY.special]


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(VOCABULARY, SIZE, (EOS,))
    yield made
    made.close()


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def next_of(grammars: Grammars, matcher: Matcher, drafts: list[int] | None = None) -> list[set[int]]:
    """What may come next, and behind each of the drafts."""
    packed = grammars.masks({0: (matcher, drafts or [])})[0]
    width = len(packed) // (1 + len(drafts or []))
    return [bits(packed[at : at + width]) for at in range(0, len(packed), width)]


def ids(text: str) -> list[int]:
    """One token for each character."""
    return [SHOWN.index(character.encode()) for character in text]


# -- what a mask allows ----------------------------------------------------------------------------------------------

WORDS = st.lists(st.text('ab \n"{é😀12', min_size=1, max_size=7), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, deadline=None)
@given(words=WORDS, data=st.data())
def test_a_mask_allows_what_leads_to_a_word_and_the_end_where_one_is_whole(
    grammars: Grammars, words: list[str], data: st.DataObject
) -> None:
    """The reference: a language that is a list of words, looked through byte by byte."""
    language = [word.encode() for word in words]
    pattern = "|".join("".join(f"[{c}]" if c not in "\n" else r"\n" for c in word) for word in words)
    matcher, said = compiled(grammars, regex(pattern), EOS), b""
    for position in range(40):
        expected = {token for token in ORDINARY if any(word.startswith(said + SHOWN[token]) for word in language)}
        if said in language:
            expected.add(EOS)
        if matcher.limit is not None:
            assert expected == {EOS}
            return
        [allowed] = next_of(grammars, matcher)
        assert allowed == expected
        token = data.draw(st.sampled_from(sorted(allowed)))
        matcher.follow(position, token)
        if token == EOS:
            assert (matcher.limit, matcher.error) == (position, None)
            return
        said += SHOWN[token]
    pytest.fail("a word of at most 28 bytes takes more tokens")


def test_special_tokens_come_only_where_a_grammar_names_them(grammars: Grammars) -> None:
    assert next_of(grammars, compiled(grammars, regex("(?s:.){1,99}"), EOS))[0].isdisjoint(VOCABULARY.special)
    spelled = next_of(grammars, compiled(grammars, regex(r"\[CALL\]"), EOS))[0]
    assert spelled == {SHOWN.index(b"[")}
    by_id = compiled(grammars, Grammar(kind="lark", text=f'start: <[{CALL}]> "a"'), EOS)
    assert next_of(grammars, by_id) == [{CALL}]
    by_name = compiled(grammars, Grammar(kind="lark", text='start: <s> "a"'), EOS)
    assert next_of(grammars, by_name) == [{1}]


def test_all_spellings_of_what_must_come_may_come(grammars: Grammars) -> None:
    matcher = compiled(grammars, regex("abc"), EOS)
    assert next_of(grammars, matcher) == [{SHOWN.index(text) for text in (b"a", b"ab", b"abc")}]


def test_ids_beyond_the_vocabulary_of_the_model_are_left_out() -> None:
    small = Grammars(VOCABULARY, 100, (EOS,))
    matcher = compiled(small, regex("abc"), EOS)
    assert bits(small.masks({0: (matcher, [])})[0], 104) == {SHOWN.index(b"a")}
    small.close()


# -- where texts end -------------------------------------------------------------------------------------------------


def test_stop_tokens_come_where_the_grammar_may_end_and_nowhere_else(grammars: Grammars) -> None:
    [comma] = ids(",")
    matcher = compiled(grammars, regex("a,+b?"), EOS, comma)
    assert not next_of(grammars, matcher)[0] & {EOS, comma}
    matcher = compiled(grammars, regex("ab?,?"), EOS, comma)
    matcher.follow(0, *ids("a"))
    assert next_of(grammars, matcher) == [{EOS, comma, *ids("b")}]
    matcher.follow(1, comma)
    assert (matcher.limit, matcher.error) == (1, None)


def test_a_text_that_can_go_on_does_not_end_before_min_tokens(grammars: Grammars) -> None:
    matcher = compiled(grammars, regex("a{1,4}"), EOS, min_tokens=3)
    seen = []
    for position in range(4):
        seen.append(EOS in next_of(grammars, matcher)[0])
        matcher.follow(position, *ids("a"))
    assert seen == [False, False, False, True]
    assert (matcher.limit, matcher.error) == (4, None)


def test_a_text_to_which_nothing_can_be_added_is_complete_whatever_min_tokens_says(grammars: Grammars) -> None:
    matcher = compiled(grammars, regex("ab"), EOS, min_tokens=9)
    for position, token in enumerate(ids("ab")):
        matcher.follow(position, token)
    assert (matcher.limit, matcher.error) == (2, None)


def test_a_text_that_no_token_continues_ends_with_an_error(grammars: Grammars) -> None:
    matcher = compiled(grammars, regex("aß"), EOS)  # whose last byte the vocabulary lacks
    matcher.follow(0, *ids("a"))
    assert next_of(grammars, matcher) == [{SHOWN.index(b"\xc3")}]
    matcher.follow(1, SHOWN.index(b"\xc3"))
    assert next_of(grammars, matcher) == [set(range(SIZE))]  # whatever is chosen is found to be wrong
    matcher.follow(2, 5)
    assert (matcher.limit, matcher.error) == (2, "response_format: no token of the vocabulary can follow")


def test_to_say_again_what_came_changes_nothing(grammars: Grammars) -> None:
    matcher = compiled(grammars, regex("abc"), EOS)
    for position in (0, 0, 1, 0, 1):
        matcher.follow(position, ids("abc")[position])
    assert next_of(grammars, matcher) == [set(ids("c"))]


# -- drafts ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(text=st.text("ab1,", min_size=1, max_size=8), start=st.integers(0, 3))
def test_masks_behind_drafts_are_those_of_tokens_that_came(grammars: Grammars, text: str, start: int) -> None:
    """As far as the drafts can come; and the completion is still where it was."""
    pattern = regex("([ab]{1,3}1?,?){1,3}")
    drafted, stepped = compiled(grammars, pattern, EOS), compiled(grammars, pattern, EOS)
    for matcher in (drafted, stepped):
        for position, token in enumerate(ids("aab")[:start]):
            matcher.follow(position, token)
    drafts = drafted.fitting(ids(text))
    before = next_of(grammars, drafted)
    masks = next_of(grammars, drafted, drafts)
    assert next_of(grammars, drafted) == before
    for position, (mask, token) in enumerate(zip(masks, drafts, strict=False), start):
        assert [mask] == next_of(grammars, stepped)
        assert token in mask
        stepped.follow(position, token)
    assert len(drafts) == len(text) or ids(text)[len(drafts)] not in masks[-1] or stepped.limit is not None


def test_drafts_that_lead_to_where_nothing_follows_do_no_harm_unless_they_come(grammars: Grammars) -> None:
    half = SHOWN.index(b"\xc3")
    matcher = compiled(grammars, regex("a(ß|b)"), EOS)  # the vocabulary lacks the last byte of ß
    matcher.follow(0, *ids("a"))
    assert matcher.fitting([half]) == [half]
    expected = {half, *ids("b")}
    assert next_of(grammars, matcher, [half])[0] == expected
    assert next_of(grammars, matcher) == [expected]
    matcher.follow(1, half)
    next_of(grammars, matcher, ids("a"))
    matcher.follow(2, 5)
    assert (matcher.limit, matcher.error) == (2, "response_format: no token of the vocabulary can follow")


def test_no_draft_is_a_stop_token(grammars: Grammars) -> None:
    matcher = compiled(grammars, regex("a+,?"), EOS, *ids(","))
    assert matcher.fitting(ids("aa,a")) == ids("aa")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (regex("(a"), ".*unclosed group"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (regex("(?<=a)b"), "look-behind, is not supported"),
        (Grammar(kind="json_schema", text="{"), "Expecting property name"),
        (Grammar(kind="json_schema", text="[1]"), "a JSON schema must be an object"),
        (Grammar(kind="json_schema", text='{"type": "objekt"}'), "Invalid type: objekt"),
        (Grammar(kind="json_schema", text='{"not": {"type": "string"}}'), r'Unimplemented keys: \["not"\]'),
        (Grammar(kind="json_schema", text='{"$ref": "http://example.com/x"}'), "does not fetch"),
        (Grammar(kind="json_schema", text='{"$ref": "file:///etc/passwd"}'), "does not fetch"),
        (Grammar(kind="json_schema", text='{"a":' * 20_000), "nested too deeply"),
        (Grammar(kind="lark", text='start: "a" b'), 'line 1, column 8: unknown name: "b"'),
        (Grammar(kind="lark", text='begin: "a"'), "no start rule found"),
        (Grammar(kind="lark", text="start: <|nobody|>"), "unknown special token"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said_in_one_line(grammars: Grammars, grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^response_format: the {grammar.kind} .*{reason}") as caught:
        compiled(grammars, grammar)
    assert "\n" not in str(caught.value)
    assert "no_forcing" not in str(caught.value)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar(kind="regex"), "the regex is empty"),
        (Grammar(kind="lark", text="x" * (MAX_GRAMMAR + 1)), f"{MAX_GRAMMAR + 1} characters must have at most"),
        (Grammar(kind="regex", text="\ud800"), "is not valid UTF-8"),
    ],
)
def test_what_needs_no_compiler_is_refused_before_it(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^response_format: .*{reason}"):
        grammar.validate()


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "an allOf of 100 patterns"])
def test_a_hostile_grammar_takes_bounded_time_whether_it_is_served_or_not(grammars: Grammars, name: str) -> None:
    began = time.monotonic()
    try:
        matcher = compiled(grammars, HOSTILE[name], EOS)
        for position in range(20):
            if matcher.limit is not None:
                break
            [allowed] = next_of(grammars, matcher)
            matcher.follow(position, min(allowed))
    except InvalidRequestError:
        pass
    assert time.monotonic() - began < 20


def test_a_grammar_that_takes_minutes_is_refused_and_others_are_served_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is held where its trial begins until another was served: how fast this machine is decides nothing."""
    slow, begun, served, judge = HOSTILE["an allOf of 100 patterns"], threading.Event(), threading.Event(), Trial.judge

    def held(trial: Trial, grammar: Grammar) -> Verdict:
        if grammar == slow:
            begun.set()
            assert served.wait(PATIENCE)
        return judge(trial, grammar, 0.2)

    monkeypatch.setattr(Trial, "judge", held)
    grammars = Grammars(VOCABULARY, SIZE, (EOS,))
    grammars.compile("slow", SamplingParams(grammar=slow))
    assert begun.wait(PATIENCE)
    assert next_of(grammars, compiled(grammars, regex("a"), EOS)) == [set(ids("a"))]
    assert grammars.is_compiling
    served.set()
    limit = time.monotonic() + PATIENCE
    while not (taken := grammars.take()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert str(taken["slow"]) == (
        "response_format: the json_schema cannot be served: it takes more than 0.2 s to compile"
    )
    grammars.close()


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (HOSTILE["an allOf of 100 patterns"], "it takes more than 0.2 s to compile"),
        (HOSTILE["5,000 anyOf"], None),
        (regex("("), 'invalid regex "(" (in regex): regex parse error: ( error: unclosed group'),
    ],
)
def test_a_trial_goes_on_after_a_grammar_that_ended_its_process(grammar: Grammar, reason: str | None) -> None:
    trial = Trial(Setting(VOCABULARY, SIZE))
    try:
        trial.judge(regex("a"))
        assert trial.judge(grammar, 0.2 if reason and "0.2" in reason else 60).reason == reason
        assert trial.judge(regex("b")).reason is None
    finally:
        trial.close()


def test_a_grammar_that_kills_its_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = "import os; os.read(0, 4096); os.write(1, bytes([0, 0, 0, 1, 0x80])); os.read(0, 4096)"
    monkeypatch.setattr(trial_module, "TRIAL", (sys.executable, "-c", ready))
    trial = Trial(Setting(Vocabulary(tokens=[], special=[]), 0))
    assert trial.judge(regex("a")).reason == "it takes too much memory to compile, or is nested too deeply"
    trial.close()


def test_what_others_compute_meanwhile_is_not_the_grammars_time() -> None:
    """The process stands still for longer than a grammar may take, as where other work has all cores."""
    trial, verdicts = Trial(Setting(VOCABULARY, SIZE)), list[Verdict]()
    trial.judge(regex("a"))
    assert trial._process is not None
    trial._process.send_signal(signal.SIGSTOP)
    judging = threading.Thread(target=lambda: verdicts.append(trial.judge(regex("b"), 0.1)))
    judging.start()
    judging.join(0.4)
    assert judging.is_alive()
    trial._process.send_signal(signal.SIGCONT)
    judging.join(30)
    assert [verdict.reason for verdict in verdicts] == [None]
    trial.close()


def test_a_grammar_that_could_not_be_tried_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(VOCABULARY, SIZE, (EOS,))
    with monkeypatch.context() as broken:
        broken.setattr(trial_module, "TRIAL", (sys.executable, "-c", ""))
        with pytest.raises(InvalidRequestError, match=r"^response_format: .* cannot be served: not now"):
            compiled(grammars, regex("a"), EOS)
    assert next_of(grammars, compiled(grammars, regex("a"), EOS)) == [set(ids("a"))]
    grammars.close()


def test_no_trial_begins_when_the_engine_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(Setting(VOCABULARY, SIZE))
    trial.close()
    with pytest.raises(OSError, match="the engine is closed"):
        trial.judge(regex("a"))
    assert trial._process is None


def test_a_trial_that_was_ended_from_outside_is_started_anew() -> None:
    trial = Trial(Setting(VOCABULARY, SIZE))
    assert trial.judge(regex("a")).reason is None
    assert trial._process is not None
    trial._process.kill()
    trial._process.wait(30)
    assert trial.judge(regex("b")).reason is None
    trial.close()


def test_a_trial_ends_with_its_engine() -> None:
    trial = Trial(Setting(VOCABULARY, SIZE))
    trial.judge(regex("a"))
    process = trial._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # as when the engine dies
    assert process.wait(30) == 0


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_once_for_all_that_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Noted(Passed):
        def judge(self, grammar: Grammar) -> Verdict:
            made.append(grammar.text)
            return super().judge(grammar)

    monkeypatch.setattr(compiler, "Trial", Noted)
    grammars = Grammars(VOCABULARY, SIZE, (EOS,))
    for name in "abc":
        grammars.compile(name, SamplingParams(grammar=regex("x+")))
    taken: dict[str, object] = {}
    while len(taken) < 3:
        taken |= grammars.take()
    for number in range(KEPT):
        compiled(grammars, regex(f"y{{{number + 1}}}"))
    assert made.count("x+") == 1
    compiled(grammars, regex("x+"))  # it was the oldest of one too many
    assert made.count("x+") == 2
    compiled(grammars, regex(f"y{{{KEPT}}}"))
    assert len(made) == KEPT + 2
    grammars.close()


def test_completions_of_one_grammar_do_not_disturb_one_another(grammars: Grammars) -> None:
    one, other = (compiled(grammars, regex("ab|ba"), EOS) for _ in range(2))
    one.follow(0, *ids("a"))
    other.follow(0, *ids("b"))
    assert next_of(grammars, one) == [set(ids("b"))]
    masks = grammars.masks({3: (one, []), 1: (other, []), 2: (one, ids("b"))})
    assert (bits(masks[3]), bits(masks[1])) == (set(ids("b")), set(ids("a")))


def test_what_nobody_waits_for_any_more_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, made = threading.Event(), list[str]()

    class Held(Passed):
        def judge(self, grammar: Grammar) -> Verdict:
            made.append(grammar.text)
            assert gate.wait(30)
            return super().judge(grammar)

    monkeypatch.setattr(compiler, "Trial", Held)
    grammars = Grammars(VOCABULARY, SIZE, (EOS,))
    for number in range(9):
        grammars.compile(str(number), SamplingParams(grammar=regex(f"a{{{number + 1}}}")))
    for number in range(8):
        grammars.cancel(str(number))
    gate.set()
    while not (taken := grammars.take()):
        time.sleep(0.001)
    assert set(taken) == {"8"}
    assert len(made) <= COMPILERS + 1
    grammars.close()


@pytest.mark.parametrize("name", WANTED)
def test_the_grammars_of_other_tests_compile(grammars: Grammars, name: str) -> None:
    assert next_of(grammars, compiled(grammars, WANTED[name].grammar, EOS)) != [set()]


def test_a_long_reason_is_cut() -> None:
    assert len(one_line("x" * 5000)) == MOST_REASON + 1
