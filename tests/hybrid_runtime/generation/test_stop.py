"""Stop strings: what is shown must not depend on how the text was cut, and must say nothing too early or too late."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_runtime.errors import UsageError
from hybrid_runtime.generation.stop import StopMatcher

# three letters, so that random stop strings overlap themselves, each other and the text
texts = st.text("ab\n", max_size=40)
stop_strings = st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=5).map(tuple)


def cut_points(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10), label="cuts"))
    bounds = [0, *cuts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def shown_by_oracle(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The shortest beginning of text that ends with a stop string decides; the longest such stop string is removed."""
    for end in range(len(text) + 1):
        endings = [string for string in stop if text[:end].endswith(string)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


def could_start_a_stop(tail: str, stop: tuple[str, ...]) -> bool:
    return any(string.startswith(tail) and string != tail for string in stop)


@settings(max_examples=500, deadline=None)
@given(text=texts, stop=stop_strings, data=st.data())
def test_any_cutting_shows_what_the_oracle_shows(text, stop, data):
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(piece) for piece in cut_points(data, text)) + matcher.flush()
    expected, matched = shown_by_oracle(text, stop)
    assert shown == expected
    assert matcher.matched == matched
    assert matcher.stopped == (matched is not None)
    assert not any(string in shown for string in stop)


@settings(max_examples=500, deadline=None)
@given(text=texts, stop=stop_strings, data=st.data())
def test_held_back_is_the_longest_tail_that_can_start_a_stop_string(text, stop, data):
    matcher, pushed, shown = StopMatcher(stop), "", ""
    for piece in cut_points(data, text):
        pushed += piece
        shown += matcher.push(piece)
        if matcher.stopped:
            assert matcher.held == ""
            continue
        tails = (pushed[start:] for start in range(len(pushed)))
        longest = next((tail for tail in tails if could_start_a_stop(tail, stop)), "")
        assert matcher.held == longest
        assert shown + matcher.held == pushed


def test_a_stop_string_cut_into_letters_is_found():
    matcher = StopMatcher(("</s>",))
    assert [matcher.push(letter) for letter in "hi</s>more"] == ["h", "i", *[""] * 8]
    assert matcher.stopped
    assert matcher.matched == "</s>"
    assert matcher.flush() == ""


def test_text_that_only_resembles_a_stop_string_comes_out_late_but_whole():
    matcher = StopMatcher(("<|end|>",))
    assert matcher.push("a <|en") == "a "
    assert matcher.push("ter|>") == "<|enter|>"
    assert matcher.push("<|e") == ""
    assert not matcher.stopped
    assert matcher.flush() == "<|e"


def test_a_failed_start_may_contain_the_true_one():
    matcher = StopMatcher(("aab",))
    assert matcher.push("aa") == ""
    assert matcher.push("a") == "a"
    assert matcher.push("b") == ""
    assert matcher.stopped


def test_the_stop_string_that_occurs_first_wins_whatever_the_order_given():
    for stop in (("three", "two"), ("two", "three")):
        matcher = StopMatcher(stop)
        assert matcher.push("one two three") == "one "
        assert matcher.matched == "two"


def test_of_stop_strings_ending_together_the_longest_is_removed():
    matcher = StopMatcher(("\n", "\n\n", "END\n"))
    assert matcher.push("the END\n") == "the "
    assert matcher.matched == "END\n"


def test_a_stop_string_inside_a_longer_one_ends_the_answer_at_once():
    pieces_together, pieces_apart = StopMatcher(("abcd", "bc")), StopMatcher(("abcd", "bc"))
    assert pieces_together.push("xabcd") == "xa"
    assert "".join(pieces_apart.push(letter) for letter in "xabcd") == "xa"
    assert pieces_apart.matched == pieces_together.matched == "bc"


def test_nothing_is_shown_after_the_stop():
    matcher = StopMatcher(("b",))
    assert matcher.push("ab") == "a"
    assert matcher.push("more, even b") == ""
    assert matcher.flush() == ""


def test_without_stop_strings_everything_passes_at_once():
    matcher = StopMatcher()
    assert matcher.push("any") == "any"
    assert matcher.push("") == ""
    assert matcher.flush() == ""
    assert not matcher.stopped


def test_repeated_and_non_ascii_stop_strings_work():
    matcher = StopMatcher(("終わり", "終わり", "🙂"))
    assert matcher.push("これで終") == "これで"
    assert matcher.push("わり。") == ""
    assert matcher.matched == "終わり"


def test_a_long_repetitive_stop_string_takes_linear_time():
    stop = ("a" * 20_000 + "b", "a" * 20_000 + "c")
    matcher = StopMatcher(stop)
    assert len(matcher.push("a" * 100_000)) == 80_000  # quadratic matching would take minutes here
    assert matcher.push("b") == ""
    assert matcher.matched == stop[0]


def test_a_pushed_answer_ends_only_once():
    matcher = StopMatcher(("x",))
    matcher.flush()
    with pytest.raises(AssertionError, match="push after flush"):
        matcher.push("more")


@pytest.mark.parametrize("stop", ["END", ["END"], ("",), (1,), ("x",) * 65], ids=["bare", "list", "empty", "int", "65"])
def test_unusable_stop_strings_are_refused(stop):
    with pytest.raises(UsageError, match=r"^stop"):
        StopMatcher(stop)
