"""Answer parsing: whatever is wrapped around an answer, the answer is read; and any text at all is read without harm."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siq_vl.parsing.answers import KINDS, agrees, is_correct, is_well_formed, number_in, parse, plain_answer, read

NARROW = "\u202f"  # narrow no-break space, as French and the SI write thousands


@pytest.mark.parametrize(
    ("output", "kind", "value"),
    [
        ("<think>7 + 4 = 11</think><answer>11</answer>", "number", 11.0),
        ("7 + 4 = 11</think>\n\n11", "number", 11.0),
        ("So we add. The answer is 11.", "number", 11.0),
        ("Adding gives \\boxed{11}.", "number", 11.0),
        ("Final answer: **$1,234.50**", "number", 1234.5),
        (f"12{NARROW}345 km", "number", 12345.0),
        ("1'234'567", "number", 1234567.0),
        ("12,34,567 rupees", "number", 1234567.0),
        ("\\frac{3}{4}", "number", 0.75),
        ("45 %", "number", 45.0),
        ("12 m²", "number", 12.0),
        ("1.2 million", "number", 1.2e6),
        ("\u22123", "number", -3.0),
        ("seven", "number", 7.0),
        ("There are 3 dogs.", "number", 3.0),
        ("between 3 and 4", "number", None),
        ("2019-2020", "number", None),
        ("version 1.2.3", "number", None),
        ("gate B12", "number", None),
        ("many", "number", None),
        ("9" * 400, "number", None),
        ("B", "choice", "b"),
        ("(b) blue", "choice", "b"),
        ("The correct option is B.", "choice", "b"),
        ("Option C: a cat", "choice", "c"),
        ("It must be (A), since it is round.", "choice", "a"),
        ("(A) or (B)", "choice", None),
        ("A cat sits there.", "choice", None),
        ("Yes, it is.", "yes_no", True),
        ("<think>red blue different</think><answer>No</answer>", "yes_no", False),
        ("True", "yes_no", True),
        ("I would say yes", "yes_no", True),
        ("yes or no", "yes_no", None),
        ("maybe", "yes_no", None),
        ("\u661f", "open", "\u661f"),
        ("**STOP**", "open", "STOP"),
        ("", "open", None),
        (None, "open", None),
        ("<think>still going", "open", None),
        ("<think>done</think>", "open", None),
        ("<think>a</think><answer></answer>", "open", None),
        ("<think>a</think><answer> </answer>", "number", None),
    ],
)
def test_read(output, kind, value):
    reading = read(output, kind=kind)
    assert reading.value == value
    assert reading.parseable == (value is not None)


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("a boat", "b"),
        ("The boat.", "b"),
        ("It looks like a boat to me", "b"),
        ("either the boat or the fish", None),
        ("D", None),
        ("C", "c"),
    ],
)
def test_choices_are_picked_by_their_text(output, letter):
    assert read(output, kind="choice", choices=("fish", "boat", "kite")).value == letter


def test_rationale_and_answer_are_told_apart():
    reading = read("The bars are 7 and 4. The answer is 11.")
    assert (reading.rationale, reading.answer, reading.well_formed) == ("The bars are 7 and 4.", "11", False)
    reading = read("red")
    assert (reading.rationale, reading.answer) == ("", "red")


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("\n<think>a\nb</think>\n<answer>b</answer> ", True),
        ("<think></think><answer>b</answer>", True),
        ("so <think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> and more", False),
        ("<think>a</think> hm <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b", False),
    ],
)
def test_well_formed_is_the_whole_output_and_nothing_else(text, well_formed):
    assert is_well_formed(text) is parse(text).well_formed is well_formed


def test_the_unparseable_is_wrong_and_a_wrong_answer_is_parseable():
    assert not is_correct("", ["red"])
    assert not is_correct("<think>red", ["red"])
    assert not is_correct("several", ["3"], kind="number")
    assert read("4", kind="number").parseable
    assert not is_correct("4", ["3"], kind="number")
    assert is_correct("There are 3.", ["3"], kind="number")


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind is 'essay'; it must be one of open, number"):
        read("x", kind="essay")


# What models put around an answer.
wrappers = st.sampled_from(
    (
        "{}",
        " {}. ",
        "**{}**",
        "<answer>{}</answer>",
        "<think>Look at the 2 bars.</think><answer>{}</answer>",
        "<think>One is 5, two is 6.</think>\n<answer>\n{}\n</answer>",
        "Look at the 2 bars, 5 and 6.</think>\n\n{}",
        "<think>5 and 6.</think>The answer is {}.",
        "5 and 6 are shown. The answer is {}.",
        "5 and 6 are shown, so the answer is **{}**",
        "First, 5.\nThen, 6.\n\nAnswer: {}",
        "Final Answer: \\boxed{{{}}}",
        "Hence \\boxed{{\\text{{{}}}}}.",
        "The answer is 99. No, wait. The answer is {}.",
    )
)


def in_thousands(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    wrapper=wrappers,
    value=st.integers(-(10**8), 10**8),
    decimals=st.integers(0, 99),
    separator=st.sampled_from(("", ",", NARROW, "\u00a0", "'")),
    unit=st.sampled_from(("", " cm", " dollars", "kg", " °C", " m²")),
)
def test_numbers_survive_whatever_is_around_them(wrapper, value, decimals, separator, unit):
    written = in_thousands(value, separator) + (f".{decimals:02d}" if decimals else "")
    expected = float(f"{value}.{decimals:02d}")
    output = wrapper.format(written + unit)
    assert read(output, kind="number").value == expected
    assert is_correct(output, [f"{value}.{decimals:02d}"], kind="number")
    assert not is_correct(output, [str(value + 1 if value >= 0 else value - 1)], kind="number")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(wrapper=wrappers, value=st.integers(0, 10_000), sign=st.sampled_from(("%", " %", " percent")))
def test_percentages_agree_with_themselves_and_with_fractions(wrapper, value, sign):
    output = wrapper.format(f"{value / 100:g}{sign}")
    assert is_correct(output, [f"{value / 100:g}%"], kind="number")
    assert is_correct(output, [repr(value / 10_000)], kind="number")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    wrapper=wrappers,
    place=st.integers(0, 3),
    written=st.sampled_from(("{L}", "({L})", "{l})", "{L}. {t}", "Option {L}", "{t}", "the {t}")),
)
def test_choices_survive_whatever_is_around_them(wrapper, place, written):
    choices = ("fish", "boat", "kite", "cup")
    letter = "abcd"[place]
    output = wrapper.format(written.format(L=letter.upper(), l=letter, t=choices[place]))
    assert read(output, kind="choice", choices=choices).value == letter
    assert is_correct(output, [letter.upper()], kind="choice", choices=choices)
    assert is_correct(output, [choices[place]], kind="choice", choices=choices)
    assert not is_correct(output, ["ABCD"[place - 1]], kind="choice", choices=choices)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(wrapper=wrappers, says=st.booleans(), written=st.sampled_from(("{}", "{}, it is", "{} it does")))
def test_yes_and_no_survive_whatever_is_around_them(wrapper, says, written):
    for word in ("yes", "Yes", "YES") if says else ("no", "No", "NO"):
        output = wrapper.format(written.format(word))
        assert read(output, kind="yes_no").value is says
        assert is_correct(output, ["yes" if says else "no"], kind="yes_no")


fragments = st.sampled_from(
    ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "The answer is", "Answer:", "12", ",", "%", "(B)",
     "\u0663", "½", "\u202f", "\n", "**", "$", "yes", "\\frac{1}{0}", "1/0", "-", ".", "é", "1e999")
)  # fmt: skip


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    output=st.one_of(
        st.text(max_size=80), st.lists(fragments, max_size=12).map(" ".join), st.lists(fragments).map("".join)
    ),
    kind=st.sampled_from(KINDS),
)
def test_any_text_is_read_without_harm(output, kind):
    reading = read(output, kind=kind, choices=("fish", "boat"))
    assert reading.parseable == (reading.value is not None)
    assert {"open": str, "number": float, "choice": str, "yes_no": bool}[kind] is type(
        reading.value
    ) or reading.value is None
    if kind == "choice":
        assert reading.value in (None, "a", "b")
    if reading.parseable:
        assert reading.answer
        again = read(reading.answer, kind=kind, choices=("fish", "boat"))
        if kind != "open":
            assert again.value == reading.value  # what was read alone says the same
    if not reading.parseable:
        assert not is_correct(output, ["red"], kind=kind, choices=("fish", "boat"))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_an_answer_agrees_with_itself(text):
    assert agrees(text, text) is bool(plain_answer(text))
    stated = number_in(text)
    assert stated is None or abs(stated[0]) != float("inf")
