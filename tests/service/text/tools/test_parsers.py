"""Calls in a model's words, for every format: whatever it writes, and however that is cut into tokens."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.service.text.tools.reading import FORMATS, TOKENS, cut, read

CALLS, ID, ARGS, OPEN, CLOSE, TAG = TOKENS
PARIS = '{"city": "Par]}\\"is", "days": [1, {"x": "}"}], "naïve": "\\u00e9 🙂"}'
ONE = [("weather", PARIS)]
TWO = [("weather", PARIS), ("get_time", "{}")]
OBJECT = f'{{"name": "weather", "arguments": {PARIS}}}'
LLAMA = f'{{"name": "weather", "parameters": {PARIS}}}'

# Format, words, text and calls.
ANSWERS = [
    ("mistral v3", [CALLS, f"[{OBJECT}]"], "", ONE),
    ("mistral v3", [CALLS, f'[{OBJECT}, {{"name": "get_time", "arguments": {{}}}}]'], "", TWO),
    ("mistral v3", ["Let me see. ", CALLS, f' [{OBJECT[:-1]}, "id": "abcdefghi"}}] '], "Let me see. ", ONE),
    ("mistral v3", [CALLS, f'[{{"arguments": {PARIS}, "name": "weather"}}]'], "", ONE),
    ("mistral v3", [CALLS, f"[{OBJECT}]", CALLS, '[{"name": "get_time"}]'], "", TWO),
    ("mistral v3", [CALLS, f"[{OBJECT}] done"], " done", ONE),
    ("mistral v3", [CALLS, f"weather{PARIS}"], "", ONE),
    ("mistral v11", [CALLS, "weather", ID, "a1B2c3D4e", ARGS, PARIS, CALLS, "get_time", ID, "x", ARGS, "{}"], "", TWO),
    ("mistral v11", ["So: ", CALLS, "weather", ARGS, " " + PARIS, "\nthat."], "So: \nthat.", ONE),
    ("mistral v13", [CALLS, f" weather {PARIS}", CALLS, "get_time{}"], "", TWO),
    ("hermes tokens", [OPEN, f"\n{OBJECT}\n", CLOSE], "", ONE),
    ("hermes tokens", ["I say <tool_call>. ", OPEN, OBJECT, CLOSE], "I say <tool_call>. ", ONE),
    ("hermes tokens", [OPEN, OBJECT, CLOSE, "\n", OPEN, '{"name": "get_time"}', CLOSE, "\n"], "", TWO),
    ("hermes text", [f"<tool_call>\n{OBJECT}\n</tool_call>\n"], "", ONE),
    ("hermes text", [f'a <<tool_call>{OBJECT}</tool_call>\n<tool_call>{{"name": "get_time"}}'], "a <", TWO),
    ("hermes text", [f"<tool_call>{OBJECT}</tool_call> <tool_ < b"], " <tool_ < b", ONE),
    ("hermes text", [f"<tool_call>{OBJECT}</tool_call> <tool_"], " <tool_", ONE),
    ("llama", [LLAMA], "", ONE),
    ("llama", [f' {LLAMA}; {{"type": "function", "name": "get_time", "parameters": {{}}}}'], "", TWO),
    ("llama", [TAG, OBJECT], "", ONE),
    ("llama", ["First this. ", TAG, LLAMA], "First this. ", ONE),
]
# Format and words in which no call begins: all of them are the text.
NO_CALLS = [
    ("mistral v3", [CALLS, " I do not know how."]),
    ("mistral v3", [CALLS, '[{"nome": "weather", "arguments": {}}]']),
    ("mistral v3", [CALLS, '[{"name": "not a name", "arguments": {}}]']),
    ("mistral v3", [CALLS, '[{"name": "\\ud800"}]']),
    ("mistral v3", [CALLS, "[]"]),
    ("mistral v3", [CALLS, '[{"name": "wea']),
    ("mistral v3", [CALLS]),
    ("mistral v3", ["[TOOL_", 'CALLS][{"name": "weather"}]']),
    ("mistral v11", ["stray ", ARGS, "{}"]),
    ("mistral v11", [CALLS, ARGS, "{}"]),
    ("mistral v11", [CALLS, "weather", ID, "abcdefghi"]),
    ("hermes tokens", [OPEN, "{{", CLOSE, "x"]),
    ("hermes tokens", ["stray", CLOSE]),
    ("hermes text", ["<tool_call>weather</tool_call>"]),
    ("hermes text", ["a < b and <tool_cal"]),
    ("llama", ['{"name": "Bob", "parameters": {}}']),
    ("llama", ['{"temperature": 21.5}']),
    ("llama", ['Like {"name": "weather", "parameters": {}}']),
    ("llama", [TAG, 'print("hi")']),
]


@pytest.mark.parametrize(("name", "words", "text", "calls"), ANSWERS)
def test_calls_are_found_and_their_arguments_are_as_the_model_wrote_them(
    name: str, words: list[str], text: str, calls: list[tuple[str, str]]
) -> None:
    assert read(name, words).said == (text, calls)


@pytest.mark.parametrize(("name", "words"), NO_CALLS)
def test_what_is_no_call_is_text_with_its_markers(name: str, words: list[str]) -> None:
    assert read(name, words).said == ("".join(words), [])


@pytest.mark.parametrize(("name", "words", "text", "calls"), ANSWERS)
def test_an_answer_that_is_cut_off_has_the_calls_up_to_there(
    name: str, words: list[str], text: str, calls: list[tuple[str, str]]
) -> None:
    letters = [letter for word in words for letter in ([word] if word in TOKENS else word)]
    for end in range(len(letters)):
        made = read(name, letters[:end]).calls
        assert [call.name for call in made] == [name for name, _ in calls[: len(made)]]
        for number, (call, (_, arguments)) in enumerate(zip(made, calls, strict=False)):
            assert arguments.startswith(call.arguments)
            assert call.arguments == arguments or number == len(made) - 1


def test_the_name_comes_as_soon_as_it_is_complete_and_arguments_as_they_are_written() -> None:
    words = [CALLS, '[{"name": "wea', 'ther"', ', "arguments": {"a', '": 1', "}}", "]"]
    made = read("mistral v3", words)
    assert [[(delta.name, delta.arguments) for delta in deltas] for deltas in made.pieces] == [
        *([], [], [("weather", "")]),
        *([("", '{"a')], [("", '": 1')], [("", "}")], [], []),
    ]


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    parser = FORMATS["hermes text"].parser((), only_one=False)
    assert [parser.push(-1, word)[0] for word in ("a <", "tool", "x", " < ", "y")] == ["a ", "", "<toolx", " < ", "y"]
    parser = FORMATS["llama"].parser(("weather",), only_one=False)
    assert [parser.push(-1, word)[0] for word in ('{"', "answer", '"', ": 1")] == ["", "", '{"answer"', ": 1"]


def test_ids_are_of_the_form_that_the_model_is_sent_back() -> None:
    for name, form in (("mistral v3", r"[a-zA-Z0-9]{9}"), ("hermes text", r"call_[0-9a-f]{24}")):
        words = [CALLS, f"[{OBJECT}, {OBJECT}]"] if "mistral" in name else [f"<tool_call>{OBJECT}" * 2]
        ids = [call.id for call in read(name, words).calls]
        assert len(set(ids)) == 2
        assert all(re.fullmatch(form, each) for each in ids)


def test_an_id_that_the_model_wrote_in_time_is_kept() -> None:
    calls = read("mistral v11", [CALLS, "weather", ID, "a1B2c3D4e", ARGS, "{}"]).calls
    assert calls[0].id == "a1B2c3D4e"
    calls = read("mistral v11", [CALLS, "weather", ID, "too short", ARGS, "{}"]).calls
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", calls[0].id)


@pytest.mark.parametrize(
    "words", [[CALLS, f"[{OBJECT}, {OBJECT}] and"], [CALLS, f"weather{PARIS}", CALLS, f"weather{PARIS} and"]]
)
def test_one_call_is_the_end_where_only_one_is_allowed(words: list[str]) -> None:
    assert read("mistral v3", ["Hm. ", *words], only_one=True).said == ("Hm. ", ONE)


def test_arguments_that_are_no_object_or_no_json_stay_what_they_are() -> None:
    for arguments in ('"{\\"city\\": 1}"', "null", "[1, 2]", '{"a": tru, b}', "-1.5e3"):
        words = [OPEN, f'{{"name": "weather", "arguments": {arguments}}}', CLOSE]
        assert read("hermes tokens", words).said == ("", [("weather", arguments)])


def test_what_is_wrong_after_the_name_leaves_the_call_and_is_text_from_there_on() -> None:
    words = [OPEN, '{"name": "weather" "arguments": {}}', CLOSE]
    assert read("hermes tokens", words).said == ('"arguments": {}}</tool_call>', [("weather", "")])
    words = [CALLS, '[{"name": "weather", "arguments": {}}; {"name": "get_time"}]']
    assert read("mistral v3", words).said == ('; {"name": "get_time"}]', [("weather", "{}")])


WORDS = st.lists(
    st.one_of(
        st.sampled_from(
            [*TOKENS, OBJECT, LLAMA, PARIS, "<tool_call>", "</tool_call>", '{"name": "weather"', "weather"]
        ),
        st.text(alphabet=' \n{}[]",:;<>\\/abtool_call1é', max_size=12),
        st.text(max_size=6),
    ),
    max_size=12,
)


@pytest.mark.parametrize("name", FORMATS)
@given(words=WORDS, seed=st.integers(0, 2**32), only_one=st.booleans())
@example(words=[CALLS, "[{", CALLS, "[", "]", OPEN, "{", "<tool_call", ">"], seed=1, only_one=False)
def test_any_words_are_read_and_how_they_are_cut_changes_nothing(
    name: str, words: list[str], seed: int, only_one: bool
) -> None:
    whole = read(name, words, only_one=only_one)
    assert read(name, cut(name, words, random.Random(seed)), only_one=only_one).said == whole.said


@pytest.mark.parametrize("name", FORMATS)
@given(words=WORDS)
def test_nothing_but_the_frame_of_calls_is_lost(name: str, words: list[str]) -> None:
    """Every letter of the text and of the calls is one that was written, in that order."""
    made = read(name, words)
    written = "".join(words)
    at = 0
    for letter in made.text:
        at = written.find(letter, at) + 1
        assert at > 0, "text that nobody wrote"
    if not made.calls:
        assert made.text == written


@pytest.mark.parametrize("name", FORMATS)
def test_long_answers_take_linear_time(name: str) -> None:
    begin = [CALLS, OPEN, TAG, '{"name": "weather", "arguments": {"a": "']

    def seconds(letters: str, count: int) -> float:
        began = time.process_time()
        read(name, [*begin, *[letters] * count])
        read(name, [letters] * count)
        return time.process_time() - began

    for letters in (" ", "<", "{", '{"a":', "[", "a", "<tool_", '\\"', CALLS, OPEN):
        limit = 15 * min(seconds(letters, 1600) for _ in range(3)) + 0.5
        # A garbage collection of all that the tests have made may fall into one, not into all three.
        assert any(seconds(letters, 8000) < limit for _ in range(3)), letters
