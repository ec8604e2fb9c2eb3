"""Decoupled prompts as text: what is read, that it round-trips, and what is said about a slip."""

import time
from dataclasses import replace

import pytest
from comfyui_gcfg.gcfg.prompt_lines import EXPECTED, MAX_WEIGHT, LineProblem, PromptLine, read_prompt_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st

BEGIN = "expected weight | prompt, such as 7.5 | sunflower, or 5 @0-60% | in Van Gogh style"

# Text that looks like lines, so that the search does not end at the first character.
PIECES = ["7.5", "-2", "+.5", "1e3", "1e400", "|", "||", "@", "@0-60%", "@60-0%", "%", "-", " ", "\t", "\r", "\n", "#"]
LIKE_LINES = st.lists(st.sampled_from([*PIECES, "sunflower", "(word:1.2)", "٣", "²", "\x00", "\u2028"])).map("".join)

FRACTIONS = st.floats(0.0, 1.0)
PROMPTS = st.text(min_size=1).map(lambda text: text.replace("\n", " ").strip()).filter(bool)
LINES = st.builds(
    lambda weight, text, ends: PromptLine(1, weight, text, min(ends), max(ends)),
    st.floats(-MAX_WEIGHT, MAX_WEIGHT),
    PROMPTS,
    st.tuples(FRACTIONS, FRACTIONS),
)


def test_the_examples_of_the_page():
    lines, problems = read_prompt_lines("7.5 | sunflower\n5 @0-60% | in Van Gogh style\n-2 | blurry")
    assert lines == [
        PromptLine(1, 7.5, "sunflower"),
        PromptLine(2, 5.0, "in Van Gogh style", 0.0, 0.6),
        PromptLine(3, -2.0, "blurry"),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  +3|a", PromptLine(1, 3.0, "a")),
        (".5 | a", PromptLine(1, 0.5, "a")),
        ("2. | a", PromptLine(1, 2.0, "a")),
        ("1e1 | a", PromptLine(1, 10.0, "a")),
        ("-100 | a", PromptLine(1, -100.0, "a")),
        ("0 | off", PromptLine(1, 0.0, "off")),
        ("7.5 | (word:1.2), embedding:style\r", PromptLine(1, 7.5, "(word:1.2), embedding:style")),
        ("7.5 | a | b", PromptLine(1, 7.5, "a | b")),
        ("7.5 | # 5 @ home", PromptLine(1, 7.5, "# 5 @ home")),
        ("5@20-80%|a", PromptLine(1, 5.0, "a", 0.2, 0.8)),
        ("5 @ 20% - 80 % | a", PromptLine(1, 5.0, "a", 0.2, 0.8)),
        ("5 @7-7% | a", PromptLine(1, 5.0, "a", 0.07, 0.07)),
        ("5 @12.5-100% | a", PromptLine(1, 5.0, "a", 0.125, 1.0)),
    ],
)
def test_lines_that_are_read(text, expected):
    assert read_prompt_lines(text) == ([expected], [])


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 56, 57, 58])
def test_a_whole_percent_is_the_fraction_that_its_decimals_name(percent):
    """29 % is the float nearest to 0.29, as a Guidance Term's end_percent of 0.29 is; 0.29 * 100 is not 29."""
    ((line,), _) = read_prompt_lines(f"1 @0-{percent}% | a")
    assert line.end_percent == float(f"0.{percent:02d}")
    assert str(line) == f"1 @0-{percent}% | a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sunflower", f"{BEGIN}; found 'sunflower'."),
        ("7.5 sunflower", f"{BEGIN}; found '7.5 sunflower'."),
        ("| sunflower", f"{BEGIN}; found '| sunflower'."),
        ("7,5 | sunflower", f"{BEGIN}; found '7,5 | sunflower'."),
        ("7.5: sunflower", f"{BEGIN}; found '7.5: sunflower'."),
        ("1.5.2 | a", f"{BEGIN}; found '1.5.2 | a'."),
        ("nan | a", f"{BEGIN}; found 'nan | a'."),
        ("5 0-60% | a", f"{BEGIN}; found '5 0-60% | a'."),
        ("(a very long prompt:1.2) that goes on and on", f"{BEGIN}; found '(a very long prompt:1.2) that goes on a…'."),
        ("750 | a", "expected a weight from -100 to 100; found 750."),
        ("-100.5 | a", "expected a weight from -100 to 100; found -100.5."),
        ("1e400 | a", "expected a weight from -100 to 100; found 1e400."),
        ("7.5 |", f"expected a prompt after |; found nothing. {BEGIN.capitalize()}."),
        ("7.5 @0-60% |  ", f"expected a prompt after |; found nothing. {BEGIN.capitalize()}."),
        ("5 @0-60 | a", "expected @start-end%, such as @0-60%; found '@0-60'."),
        ("5 @ | a", "expected @start-end%, such as @0-60%; found '@'."),
        ("5 @60% | a", "expected @start-end%, such as @0-60%; found '@60%'."),
        ("5 @0:60% | a", "expected @start-end%, such as @0-60%; found '@0:60%'."),
        ("5 @60-0% | a", "expected 0 <= start <= end <= 100 in @start-end%; found '@60-0%'."),
        ("5 @0-160% | a", "expected 0 <= start <= end <= 100 in @start-end%; found '@0-160%'."),
        ("5 @-10-60% | a", "expected 0 <= start <= end <= 100 in @start-end%; found '@-10-60%'."),
        ("5 @0-1e400% | a", "expected 0 <= start <= end <= 100 in @start-end%; found '@0-1e400%'."),
    ],
)
def test_slips_are_named_with_their_line(line, message):
    lines, problems = read_prompt_lines(f"# first\n1 | good\n\n{line}")
    assert lines == [PromptLine(2, 1.0, "good")]
    assert problems == [LineProblem(4, message)]
    assert str(problems[0]) == f"line 4: {message}"


def test_the_message_for_the_editor_is_that_of_the_parser():
    assert EXPECTED == BEGIN


def seconds_of(text):
    begin = time.perf_counter()
    read_prompt_lines(text)
    return time.perf_counter() - begin


@pytest.mark.parametrize(
    "line",
    [
        "1 @" + "1" * 800 + "-" + "1" * 800 + "x | a",
        "1" * 20_000 + "x | a",
        "1 @0" + " " * 20_000 + "x | a",
        " " * 20_000 + "x | a",
        "1 @" + " " * 20_000 + "| a",
        "|" * 20_000,
    ],
)
def test_a_line_made_to_take_long(line):
    """Each of them took seconds, up to 39, with patterns of quadratic time or worse; now less than a millisecond."""
    assert seconds_of(line) < 0.5


@pytest.mark.parametrize("head", ["1" * 99 + "x", "1 @" + "1" * 46 + "-" + "1" * 46 + "%x"])
def test_a_pattern_gives_up_at_once(head):
    """Below the cap nothing else keeps a pattern from trying a line in many ways: 100 times 10 lines."""
    assert seconds_of("\n".join([f"{head} | a"] * 99)) < 0.5


def test_a_long_head_is_refused():
    (problem,) = read_prompt_lines("9" * 101 + " | a")[1]
    assert problem.message == f"{BEGIN}, at most 100 characters before |; found '{'9' * 39}…'."
    assert read_prompt_lines(" " * 999 + "0" * 99 + "9 | a") == ([PromptLine(1, 9.0, "a")], [])


def test_too_many_lines_are_one_problem():
    text = "# remark\n\n" + "1 | a\n" * 99 + "x\n"
    lines, problems = read_prompt_lines(text)
    assert (len(lines), [problem.number for problem in problems]) == (99, [102])
    lines, problems = read_prompt_lines(text + "1 | b\n" * 50_000)
    assert (len(lines), [problem.number for problem in problems]) == (99, [102, 103])
    assert problems[1].message == "expected at most 100 lines; take this and the rest out."


def test_what_a_terminal_or_json_trips_over_is_escaped():
    lines, problems = read_prompt_lines("a\ud83d\x1b[2J | b\n1 | c\ud83d")
    assert lines == []
    assert [problem.message for problem in problems] == [
        rf"{BEGIN}; found 'a\ud83d\x1b[2J | b'.",
        r"expected whole characters; found \ud83d, half of one; delete it.",
    ]


@settings(deadline=None)
@given(LINES)
@example(PromptLine(1, 7.5, "a", 0.07, 0.29))
@example(PromptLine(1, 5e-324, "a", 5e-324, 1.0))
@example(PromptLine(1, -0.0, "a", 0.1 + 0.2, 1 - 2**-53))
@example(PromptLine(1, -2.2250738585072014e-308, "a", 2.2250738585072014e-308, 1.2345678901234567e-9))
@example(PromptLine(1, 1.0, "a", 1.2345678901234567e-10, 9.999999999999999e-10))
def test_a_line_read_again_is_the_same(line):
    assert read_prompt_lines(str(line)) == ([line], [])


@settings(deadline=None)
@given(LIKE_LINES | st.text())
@example("1e" + "9" * 5000 + " | a")
@example("9" * 5000 + " | a")
@example("1 @0-1e" + "9" * 5000 + "% | a")
@example("1 @0-" + "9" * 5000 + "% | a")
@example("1 @0.5-60e-1% | a")
def test_any_text_is_read_and_what_is_read_round_trips(text):
    """Never a crash; every line that is neither empty nor a comment is a condition or a problem, under its number."""
    lines, problems = read_prompt_lines(text)
    rows = text.split("\n")
    found = sorted(entry.number for entry in [*lines, *problems])
    assert found == [n for n, row in enumerate(rows, start=1) if row.strip() and not row.strip().startswith("#")]
    for line in lines:
        assert abs(line.weight) <= MAX_WEIGHT
        assert 0.0 <= line.start_percent <= line.end_percent <= 1.0
        assert line.text
        assert line.text in rows[line.number - 1]
        assert read_prompt_lines(str(line)) == ([replace(line, number=1)], [])
    for problem in problems:
        assert problem.message.endswith(".")
        assert "\n" not in problem.message


@settings(deadline=None)
@given(st.lists(LINES, max_size=5))
def test_a_text_of_lines_is_those_lines(conditions):
    lines, problems = read_prompt_lines("\n".join(map(str, conditions)))
    assert lines == [replace(line, number=number) for number, line in enumerate(conditions, start=1)]
    assert problems == []
