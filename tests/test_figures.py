"""The drawn data set: deterministic, consistent with itself, and honest about its splits."""

import hashlib
import re
from collections import Counter

import pytest

from siq_vl.data.figures.dataset import DOMAINS, SPLITS, STYLES, content_split, rationale, sample
from siq_vl.data.figures.drawing import SIZE
from siq_vl.data.figures.lexicon import HELD_OUT_OBJECTS, HELD_OUT_SERIES_COUNT, HELD_OUT_SIGNS
from siq_vl.data.figures.rows import row, training_rows
from siq_vl.parsing.answers import fact_score

# Of the pixels, captions, questions and answers of the first 300 training samples. It changes only when the drawn
# data set changes, and then every number measured on it has to be measured again.
FINGERPRINT = "e0ad685af4839638ce2ed6521338c9538da925a30bb2427404f38b334c725951"


def drawn(split: str, count: int, **options) -> list:
    return [sample(split, index, **options) for index in range(count)]


def test_same_bytes_everywhere():
    digest = hashlib.sha256()
    for made in drawn("train", 300):
        digest.update(made.image.tobytes())
        digest.update("|".join((made.figure.caption, made.question.text, made.question.answer)).encode())
    assert digest.hexdigest() == FINGERPRINT


def test_seed_and_index_decide_the_sample():
    first, again, other = sample("train", 7), sample("train", 7), sample("train", 7, seed=1)
    assert first == again
    assert first.image.tobytes() == again.image.tobytes()
    assert first.figure != other.figure


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_disjoint_by_content(split):
    assert {content_split(made.figure) for made in drawn(split, 300)} == {split}


def test_no_training_caption_is_evaluated():
    trained = {made.figure.caption for seed in range(3) for made in drawn("train", 1500, seed=seed)}
    evaluated = {made.figure.caption for split in ("test", "validation", "combinations") for made in drawn(split, 300)}
    assert not trained & evaluated


def test_training_never_shows_held_out_combinations():
    for made in drawn("train", 2000):
        facts = made.figure.facts
        if made.figure.domain == "scenes":
            assert not {(color, name) for _, name, color in facts} & HELD_OUT_OBJECTS
        elif made.figure.domain == "charts":
            assert len(facts) != HELD_OUT_SERIES_COUNT
        elif made.figure.kind == "sign":
            assert not {fact[1] for fact in facts} & HELD_OUT_SIGNS


def test_every_domain_and_question_type_occurs():
    made = drawn("test", 1500, hard=False)
    assert Counter(m.figure.domain for m in made) == dict.fromkeys(DOMAINS, 500)
    types = {domain: {m.question.type for m in made if m.figure.domain == domain} for domain in DOMAINS}
    assert types["scenes"] >= {"object", "number", "color", "location", "yes_no"}
    assert types["charts"] >= {"value", "compare", "yes_no", "difference", "sum", "maximum", "minimum"}
    assert types["documents"] >= {"value", "text", "color", "sum", "digit_sum"}


def test_pictures_are_square_rgb():
    for made in drawn("train", 60):
        assert made.image.size == (SIZE, SIZE)
        assert made.image.mode == "RGB"


def answer_from_caption(question: str, caption: str) -> str | None:
    """Work an answer out from the caption alone, by other code than the generator's; None where it does not know how."""
    kind, _, listed = caption.partition(": ")
    values = (
        {key: int(value) for key, value in (fact.split() for fact in listed.split(", "))}
        if kind in ("columns", "rows", "axis", "receipt")
        else {}
    )
    named = [word for word in re.findall(r"[A-Za-z]+", question) if word in values]
    if question.startswith(("What is the sum of all", "What is the total")):
        return str(sum(values.values()))
    if question.startswith(("What is the sum of", "How much are")) and len(named) == 2:
        return str(values[named[0]] + values[named[1]])
    if "difference between" in question or question.startswith("How far apart"):
        return str(abs(values[named[0]] - values[named[1]]))
    if question.startswith(("What is the value of", "How much is the", "What does the", "What value does")) and named:
        return str(values[named[0]])
    if question.startswith(("Is the", "Is ", "Does ")) and len(named) == 2:
        return "yes" if values[named[0]] > values[named[1]] else "no"
    if question.startswith("Where is the"):
        return next(fact.split()[0] for fact in listed.split(", ") if fact.split()[1] == question[:-1].split()[-1])
    if question.startswith("How many objects are there"):
        return str(len(listed.split(", ")))
    if match := re.match(r"How many objects are (\w+)", question):
        return str(sum(fact.split()[2] == match[1] for fact in listed.split(", ")))
    return None


def test_answers_follow_from_captions():
    checked = Counter()
    for made in [*drawn("train", 3000), *drawn("test", 300, hard=True)]:
        expected = answer_from_caption(made.question.text, made.figure.caption)
        if expected is not None:
            assert made.question.answer == expected, (made.question.text, made.figure.caption)
            checked[made.figure.domain] += 1
    assert min(checked[domain] for domain in DOMAINS) > 150


def test_rationales_state_true_facts_and_true_arithmetic():
    sums = 0
    for made in drawn("train", 2000):
        text = rationale(made.figure, made.question)
        assert text.startswith(made.figure.caption)
        for left, operator, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
            assert int(left) + int(right) * (1 if operator == "+" else -1) == int(result)
            sums += 1
        for left, right in re.findall(r"(\d+) > (\d+)", text):
            assert int(left) > int(right)
    assert sums > 200


@pytest.mark.parametrize("style", STYLES)
def test_styles_end_alike(style):
    for made in drawn("train", 60):
        last = made.question.steps[-1]
        assert rationale(made.figure, made.question, style).endswith(last)


def test_fact_score_counts_missing_and_invented_facts():
    gold = "receipt: tea 4, ham 7"
    assert fact_score(gold, gold) == 1.0
    assert fact_score("receipt: tea 4", gold) == 0.5
    assert fact_score("receipt: tea 4, ham 7, jam 1, jam 1", gold) == 0.5
    assert fact_score("receipt: tea 5, ham 8", gold) == 0.0
    assert fact_score("", gold) == 0.0


def test_rows_are_drawn_when_read():
    rows = training_rows("train", 1_000_000, "reason", direct_share=0.5)
    kinds = Counter(rows[index]["chat_template_kwargs"]["enable_thinking"] for index in range(40))
    assert len(rows) == 1_000_000
    assert min(kinds[True], kinds[False]) > 5


def test_blind_rows_hold_no_picture():
    made = row(sample("train", 0), "answer", blind=True)
    assert made["images"] == []
    assert [part["type"] for part in made["prompt"][0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample("dev", 0), "split is 'dev'"),
        (lambda: sample("train", 0, domain="maps"), "domain is 'maps'"),
        (lambda: sample("train", 0, domain="scenes", hard=True), "no hard samples"),
        (lambda: rationale(sample("train", 0).figure, sample("train", 0).question, "poetic"), "style is 'poetic'"),
        (lambda: row(sample("train", 0), "sing"), "task is 'sing'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
