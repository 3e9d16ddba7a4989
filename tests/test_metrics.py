"""The metrics: their published examples, the definitions worked by hand, and truth known exactly on drawn figures.

Numbers of published examples name their source; all others follow from the definition in the test's own lines.
"""

import importlib.util
import math
import os
import random
import socket
from types import ModuleType

import evaluate
import pytest
from conftest import REPO_ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from siq_vl.data.figures.dataset import STYLES, rationale, sample
from siq_vl.data.figures.rows import reasoned
from siq_vl.distill.teachers.oracle import misread_figure
from siq_vl.evaluation import metrics
from siq_vl.evaluation.metrics import METRICS, without_gold
from siq_vl.evaluation.metrics.matching import edit_distance, vqa_normalized

# The test of pix2struct's metrics (google-research/pix2struct, metrics_test.py): predictions, targets, and what they score.
PIX2STRUCT = (
    ("abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"),
    ("abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"),
)


def scores(name: str, predictions, references=None, **options) -> list[float]:
    return [row["score"] for row in METRICS[name].rows(predictions, references, **options)]


@pytest.mark.parametrize(("name", "percent"), [("exact_match", 12.5), ("anls", 47.5), ("relaxed_accuracy", 62.5)])
def test_the_published_example_of_pix2struct(name, percent):
    predictions, targets = PIX2STRUCT
    computed = METRICS[name].compute(predictions, [[target] for target in targets])
    assert 100 * computed[name] == pytest.approx(percent)
    assert computed["unparseable"] == 0


class TestVqaAccuracy:
    @pytest.mark.parametrize("agreeing", range(11))
    def test_is_the_mean_over_nine_of_ten_annotators(self, agreeing):
        golds = ["cat"] * agreeing + [f"animal {number}" for number in range(10 - agreeing)]
        own, others = min(1, max(agreeing - 1, 0) / 3), min(1, agreeing / 3)
        expected = (agreeing * own + (10 - agreeing) * others) / 10
        assert metrics.vqa_accuracy("cat", golds)["score"] == pytest.approx(expected)
        assert expected == pytest.approx(min(1, 0.3 * agreeing))  # the rule of thumb, exact for ten annotators

    @pytest.mark.parametrize(
        ("written", "compared"),
        [
            ("The two Dogs.", "2 dogs"),
            ("none", "0"),
            ("1,000", "1000"),
            ("1.5", "1.5"),
            ("black/white", "black white"),
            ("t-shirt , red", "t shirt red"),  # a mark beside a space goes, one between words becomes a space
            ("dont", "don't"),
            ("couldnt've", "couldn't've"),
            ("an apple!", "apple"),
            ("Él", "él"),
        ],
    )
    def test_normalization(self, written, compared):
        assert vqa_normalized(written) == compared

    def test_unanimous_annotators_are_compared_as_they_stand(self):
        assert metrics.vqa_accuracy("Yes", ["yes"] * 10)["score"] == 0
        assert metrics.vqa_accuracy("Yes", ["yes"] * 10, always_normalize=True)["score"] == 1
        assert metrics.vqa_accuracy("Yes", ["yes"] * 9 + ["no"])["score"] == 1

    def test_a_single_gold_answer_is_met_or_not(self):
        assert metrics.vqa_accuracy("The cat", "cat")["score"] == 1
        assert metrics.vqa_accuracy("dog", "cat")["score"] == 0


def test_exact_match_as_is_and_as_in_squad():
    assert metrics.exact_match("The Cat!", ["cat"]) == {"score": 0.0, "unparseable": 0.0, "normalized": 1.0}
    assert metrics.exact_match("cat", ["dog", "cat"]) == {"score": 1.0, "unparseable": 0.0, "normalized": 1.0}
    assert metrics.exact_match("theatre", ["atre"])["normalized"] == 0


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-104", "-100", True),
        ("-100", "100", False),
        ("5%", "0.05", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("2020", "2021", True),
        ("Blue", "blue", True),
        ("blueish", "blue", False),
        ("inf", "inf", True),
        ("nan", "5", False),
    ],
)
def test_relaxed_accuracy(answer, gold, right):
    assert scores("relaxed_accuracy", [answer], [[gold]]) == [right]


def test_relaxed_accuracy_takes_the_best_gold_and_any_tolerance():
    assert scores("relaxed_accuracy", ["90"], [["100", "91"]]) == [1]
    assert scores("relaxed_accuracy", ["90"], [["100"]], tolerance=0.1) == [1]


class TestAnls:
    def test_edit_distance(self):
        assert edit_distance("kitten", "sitting") == 3
        assert edit_distance("", "abc") == edit_distance("abc", "") == 3
        assert edit_distance("ab", "ba") == 2

    def test_similarity_and_threshold(self):
        assert scores("anls", ["Hello  World"], [["hello world"]]) == [1]
        assert scores("anls", ["sitting"], [["kitten", "fitting"]]) == [pytest.approx(1 - 1 / 7)]
        assert scores("anls", ["ab"], [["ac"]]) == [0.5]  # at the threshold
        assert scores("anls", ["abc"], [["axx"]]) == [0]  # below
        assert scores("anls", ["abc"], [["axx"]], threshold=0.3) == [pytest.approx(1 / 3)]
        assert scores("anls", ["日本"], [["日本語"]]) == [pytest.approx(2 / 3)]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(a=st.text("abc ", max_size=8), b=st.text("abc ", max_size=8), c=st.text("abc ", max_size=8))
    def test_edit_distance_is_a_metric(self, a, b, c):
        assert edit_distance(a, b) == edit_distance(b, a)
        assert (edit_distance(a, b) == 0) == (a == b)
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
        assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


class TestMultipleChoice:
    choices = ("fish", "boat", "kite")

    def test_letters_texts_and_indices(self):
        predictions = ["B", "(b)", "boat", "The answer is B.", "B. boat", "A", "a whale", ""]
        for gold in ("B", "b", "1", "boat"):
            rows = METRICS["multiple_choice"].rows(predictions, [[gold]] * 8, choices=[self.choices] * 8)
            assert [row["score"] for row in rows] == [1, 1, 1, 1, 1, 0, 0, 0]
            assert [row["unparseable"] for row in rows] == [0, 0, 0, 0, 0, 0, 1, 1]

    def test_a_gold_answer_outside_the_choices_is_named(self):
        with pytest.raises(ValueError, match=r"sample 1: gold answer is 'E'; give a letter"):
            METRICS["multiple_choice"].rows(["A", "A"], [["A"], ["E"]], choices=[self.choices] * 2)


class TestPope:
    def test_a_worked_table_of_confusion(self):
        said = ["Yes", "Yes, there is a dog.", "No", "no.", "There is not a cat. Yes", "No, nothing", "There is a tree"]
        true = ["yes", "no", "no", "yes", "no", "no", "yes"]
        computed = METRICS["pope"].compute(said, [[gold] for gold in true])
        tp, fp, tn, fn = 2, 1, 3, 1
        assert computed["accuracy"] == (tp + tn) / 7
        assert computed["precision"] == tp / (tp + fp)
        assert computed["recall"] == tp / (tp + fn)
        assert computed["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert computed["yes_rate"] == 3 / 7
        assert computed["unparseable"] == 0

    def test_what_says_neither_is_wrong_either_way_and_no_yes(self):
        computed = METRICS["pope"].compute(["maybe", "", "yes", "no"], [["yes"], ["no"], ["yes"], ["no"]])
        assert (computed["accuracy"], computed["unparseable"], computed["yes_rate"]) == (0.5, 0.5, 0.25)
        assert computed["precision"] == computed["recall"] == computed["f1"] == 0.5

    def test_only_no_and_never_right_yes_leave_ratios_at_zero(self):
        computed = METRICS["pope"].compute(["no", "no"], [["yes"], ["no"]])
        assert (computed["accuracy"], computed["precision"], computed["recall"], computed["f1"]) == (0.5, 0, 0, 0)

    def test_other_golds_are_refused(self):
        with pytest.raises(
            ValueError, match="sample 0: gold answers are .'perhaps'.; POPE asks for one, 'yes' or 'no'"
        ):
            METRICS["pope"].rows(["yes"], [["perhaps"]])


class TestHallucination:
    caption = "scene: top-left star red, top-right house blue, bottom-left ball blue"

    @pytest.mark.parametrize(
        ("text", "stated", "contradicted"),
        [
            ("star red", 1, 0),
            ("star blue", 1, 1),
            ("The star is red. The house is red.", 2, 1),
            ("The star is red and the ball is blue, but the house is green.", 3, 1),
            ("the top left stars are red", 1, 0),
            ("there is no kite", 1, 0),
            ("there is no star", 1, 1),
            ("the star is not red", 1, 1),
            ("the star is not blue", 1, 0),
            ("house blue. ball blue. blue blue same", 2, 0),
            ("3 + 4 = 7. yes. 12", 0, 0),
            ("Which object is red?", 0, 0),
            (caption, 4, 0),
            (caption.replace("scene", "rows"), 4, 1),
            (caption.replace("top-left", "bottom-right"), 4, 1),
            ("star red. " * 5, 5, 0),
            ("", 0, 0),
        ],
    )
    def test_statements_about_a_scene(self, text, stated, contradicted):
        row = metrics.hallucination(text, self.caption)
        assert (row["stated"], row["contradicted"], row["unread"]) == (stated, contradicted, 0)

    @pytest.mark.parametrize(
        ("text", "caption", "stated", "contradicted"),
        [
            ("January is 7, Mar is 9", "columns: Jan 7, Mar 8", 2, 1),
            ("Jan 7, Mar 8 so 8. 8 Mar", "columns: Jan 7, Mar 8", 3, 0),
            ("It may be 7", "rows: Jan 7, May 8", 0, 0),
            ("A yellow car with A 60", "plate: yellow A 60", 1, 0),
            ("yellow A 60. 60 is 6 0. 0 even", "plate: yellow A 60", 1, 0),
            ("The black sign says OPEN", "sign: black STOP", 1, 1),
            ("an open door, black STOP", "sign: black STOP", 1, 0),
            ("tea 4, jam 5", "receipt: tea 4, jam 6", 2, 1),
        ],
    )
    def test_statements_about_other_figures(self, text, caption, stated, contradicted):
        row = metrics.hallucination(text, caption)
        assert (row["stated"], row["contradicted"]) == (stated, contradicted)

    def test_wrong_bindings_are_seen_by_facts_and_not_by_mentions(self):
        row = metrics.hallucination("star blue", self.caption)
        assert (row["contradicted"], row["absent"]) == (1, 0)
        row = metrics.hallucination("a green kite", self.caption)
        assert (row["contradicted"], row["mentioned"], row["absent"]) == (1, 2, 2)

    def test_clauses_that_cannot_be_read_are_counted_apart(self):
        row = metrics.hallucination("the star near the house", self.caption)
        assert (row["stated"], row["unread"]) == (0, 1)

    @pytest.mark.parametrize("split", ["test", "combinations"])
    def test_truth_states_much_and_contradicts_nothing(self, split):
        for index in range(150):
            drawn = sample(split, index)
            for style in STYLES:
                output = reasoned(rationale(drawn.figure, drawn.question, style), drawn.question.answer)
                row = metrics.hallucination(output, drawn.figure.caption)
                assert row["stated"] > 0, output
                assert row["contradicted"] == row["absent"] == row["unread"] == 0, output

    def test_one_misread_fact_is_one_contradiction(self):
        counted = 0
        for index in range(300):
            figure = sample("test", index).figure
            misread = misread_figure(figure, random.Random(index))
            if misread.caption == figure.caption:
                continue
            counted += 1
            row = metrics.hallucination(misread.caption, figure.caption)
            assert row["contradicted"] == 1, (misread.caption, figure.caption)
            assert row["stated"] == 1 + len(figure.facts)  # the kind, and every fact
        assert counted > 250

    def test_rates_are_over_all_statements(self):
        outputs = ["star red. star red. star red", "star blue", "seven"]
        computed = METRICS["hallucination"].compute(outputs, [self.caption] * 3)
        assert computed["hallucination_rate"] == 1 / 4
        assert computed["hallucinated_outputs"] == 1 / 3
        assert computed["chair_i"] == computed["chair_s"] == 0
        assert computed["stated"] == 4 / 3

    def test_no_statement_no_rate(self):
        computed = METRICS["hallucination"].compute(["seven"], [self.caption])
        assert math.isnan(computed["hallucination_rate"])

    def test_only_drawn_captions_hold_the_whole_truth(self):
        with pytest.raises(ValueError, match="sample 0: caption is 'A dog on a lawn.'; it must be a drawn figure's"):
            METRICS["hallucination"].rows(["a dog"], ["A dog on a lawn."])


class TestChair:
    # In the manner of the paper's figure 1: synonyms, plurals, names of two words.
    vocabulary = {
        "person": ("man", "woman", "people"),
        "wine glass": (),
        "glass": (),
        "dining table": ("table",),
        "bench": (),
    }

    def test_mentions(self):
        text = "Two women... a woman and a man at tables with wine glasses."
        row = metrics.chair(text, ["person", "table"], self.vocabulary)
        assert row == {
            "mentioned": 5.0,
            "absent": 1.0,
        }  # women, woman, man, tables; and wine glasses, which are no glass

    @pytest.mark.parametrize(
        ("many", "one"),
        [("boxes", "box"), ("buses", "bus"), ("glasses", "glass"), ("berries", "berry"), ("benches", "bench"),
         ("knives", "knife"), ("firemen", "fireman"), ("houses", "house"), ("dogs", "dog"), ("tennis", "tennis")],
    )  # fmt: skip
    def test_plurals(self, many, one):
        assert metrics.chair(f"{many}, {one}", [one], {one: ()}) == {"mentioned": 2.0, "absent": 0.0}

    def test_rates(self):
        captions = ["a man on a bench", "a man, a woman", "nothing"]
        objects = [["man"], ["people"], []]
        computed = METRICS["chair"].compute(captions, objects, vocabulary=self.vocabulary)
        assert computed["chair_i"] == 1 / 4
        assert computed["chair_s"] == 1 / 3

    def test_unknown_objects_are_named(self):
        with pytest.raises(ValueError, match="sample 0: object is 'zebra', which the vocabulary lacks"):
            METRICS["chair"].rows(["a zebra"], [["zebra"]], vocabulary=self.vocabulary)


WORDS = "the cat sat on a mat, The CAT's 12 3.5 x-y é 日本"
words = st.lists(st.sampled_from(WORDS.split(" ")), max_size=25).map(" ".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=words | st.text(max_size=40), reference=words | st.text(max_size=40))
def test_rouge_l_equals_the_library(text, reference):
    row = metrics.rouge_l(text, reference)
    expected = RougeScorer(["rougeL"], use_stemmer=False).score(target=reference, prediction=text)["rougeL"]
    assert (row["precision"], row["recall"], row["score"]) == pytest.approx(tuple(expected))


def test_rouge_l_worked():
    # Lin (2004), section 3: "police killed the gunman" against two candidates, longest common subsequences 3 and 2 of 4.
    assert metrics.rouge_l("police kill the gunman", "police killed the gunman")["score"] == 3 / 4
    assert metrics.rouge_l("the gunman kill police", "police killed the gunman")["score"] == 2 / 4


def test_lengths_of_rationales():
    outputs = ["<think>Jan 7, Feb 9.</think><answer>9</answer>", "9", "<think>one two</think><answer>2</answer>"]
    assert [row["length"] for row in METRICS["cot_length"].rows(outputs)] == [6, 0, 2]
    assert [row["length"] for row in METRICS["cot_length"].rows(outputs, unit="words")] == [4, 0, 2]
    assert [row["length"] for row in METRICS["cot_length"].rows(outputs, unit="characters")] == [13, 0, 7]
    computed = METRICS["cot_length"].compute(outputs)
    assert (computed["mean"], computed["median"], computed["max"]) == (pytest.approx(8 / 3), 2, 6)
    assert computed["without"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="unit is 'miles'"):
        METRICS["cot_length"].rows(outputs, unit="miles")


def test_format_rate():
    outputs = ["<think>a</think><answer>b</answer>", "<think>a</think><answer>b</answer>!", "b", ""]
    assert METRICS["format_rate"].compute(outputs)["format_rate"] == 1 / 4


@pytest.mark.parametrize(
    ("output", "failing"),
    [
        ("<think>Jan 7. Feb 9. 7 + 9 = 16</think><answer>16</answer>", set()),
        ("<think>ball red. star red. red red same</think><answer>yes</answer>", set()),
        ("<think>Jan 7. Feb 9. 7 + 9 = 16</think><answer>61</answer>", {"conclusion"}),
        ("<think>7 + 9 = 16</think><answer>16</answer>", {"steps"}),
        ("Jan 7. Feb 9 is more. The answer is Feb.", {"tags"}),
        ("<think></think><answer>16</answer>", {"rationale", "steps", "conclusion"}),
        ("<think>Jan 7. Feb 9", {"tags", "answer", "conclusion"}),
        ("", {"tags", "rationale", "answer", "steps", "conclusion"}),
    ],
)
def test_structure_score(output, failing):
    row = metrics.structure_score(output)
    assert {name for name, held in row.items() if name != "score" and not held} == failing
    assert row["score"] == pytest.approx(1 - len(failing) / 5)


def test_true_rationales_are_structured():
    for index in range(60):
        drawn = sample("test", index)
        row = metrics.structure_score(reasoned(rationale(drawn.figure, drawn.question), drawn.question.answer))
        assert row["score"] >= 0.8, row


def test_repetition():
    loop, sound = "the star is red. " * 20, "Jan is 7 and Feb is 9, so the sum of the two values is 16."
    computed = METRICS["repetition"].compute([loop, sound, ""])
    assert computed["loop_rate"] == pytest.approx(1 / 3)
    rows = computed["per_sample"]
    # Five pieces, twenty times: 97 runs of four, five of them different.
    assert rows[0]["rep_4"] == pytest.approx(1 - 5 / 97)
    assert rows[1]["rep_4"] == rows[2]["rep_4"] == 0
    assert metrics.repetition("a b c d a b c d")["rep_4"] == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("output", "question", "ignored"),
    [
        ("yes", "Is the ball red?", set()),
        ("<think>It is red.</think><answer>No.</answer>", "The ball is large. Is it red?", set()),
        ("The ball", "Is the ball red?", {"kind"}),
        ("red", "Is the ball red or blue?", set()),
        ("maybe", "Answer with yes or no: what about the ball", {"kind"}),
        ("three", "How many balls are there?", set()),
        ("some balls", "How many balls are there?", {"kind"}),
        ("B", "Is it a cat?\nA. yes\nB. no\nAnswer with the option's letter.", set()),
        ("a cat", "What is it?\nA. dog\nB. cat\nAnswer with the option's letter from the given choices.", {"kind"}),
        ("the second", "Is it a cat?\n(A) a dog (B) a cat", set()),
        ("red", "What colour is it? Answer with a single word.", set()),
        ("it is a kind of dark red", "What colour is it?\nAnswer using a single word or phrase.", {"long"}),
        ("it is a kind of dark red", "What colour is it?", set()),
        ("The image shows a red ball.", "What colour is the ball?", {"described"}),
        ("scene: top-left ball red", "What colour is the ball?", {"described"}),
        ("The image shows a red ball.", "Describe the picture.", set()),
        ("The image shows a red ball.", "Can you describe it?", set()),
        ("<think>still", "How many balls are there?", set()),  # unparseable, which is counted apart
        ("", "How many balls are there?", set()),
    ],
)
def test_ignored_instructions(output, question, ignored):
    row = metrics.ignored_instruction(output, question)
    assert {name for name, held in row.items() if name != "score" and held} == ignored
    assert row["score"] == float(bool(ignored))


@pytest.mark.parametrize("split", ["test", "combinations"])
def test_true_answers_ignore_nothing_and_captions_do(split):
    for index in range(150):
        drawn = sample(split, index)
        for output in (
            drawn.question.answer,
            reasoned(rationale(drawn.figure, drawn.question), drawn.question.answer),
        ):
            assert metrics.ignored_instruction(output, drawn.question.text)["score"] == 0, drawn.question
        assert metrics.ignored_instruction(drawn.figure.caption, drawn.question.text)["described"] == 1


def test_mixed_language():
    foreign = "首先观察图片中的内容，然后读取每一个数值"
    french = "Le ballon est rouge et la maison est bleue, donc les deux objets ne sont pas de la même couleur du tout."
    english = "The ball is red and the house is blue, so the two objects do not have the same color at all."
    outputs = [f"<think>{english} {foreign}</think><answer>no</answer>", french, english, "11", ""]
    assert scores("mixed_language", outputs) == [1, 1, 0, 0, 0]
    assert scores("mixed_language", [french], language="fr") == [0]
    assert scores("mixed_language", [f"The sign says {foreign}"], known=foreign) == [0]


class TestRunningAccuracy:
    def test_curve_and_volatility(self):
        computed = METRICS["running_accuracy"].compute([1, 0, 1, 1])
        assert computed["curve"] == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
        half = [1 / 2, 2 / 3, 3 / 4]
        expected = math.sqrt(sum((value - 3 / 4) ** 2 for value in half) / 3)
        assert computed["volatility"] == pytest.approx(expected)
        assert computed["stability"] == pytest.approx(1 - expected)
        assert computed["accuracy"] == 3 / 4

    def test_by_chance_is_the_mean_over_orders(self):
        made, rng = [1, 0, 1, 1, 0, 0.5, 1], random.Random(0)
        squares = []
        for _ in range(4000):
            rng.shuffle(made)
            squares.append(METRICS["running_accuracy"].compute(made)["volatility"] ** 2)
        expected = METRICS["running_accuracy"].compute(made)["volatility_by_chance"] ** 2
        assert sum(squares) / len(squares) == pytest.approx(expected, rel=0.05)

    def test_drift_is_unstable_and_alternation_is_not(self):
        drifting = METRICS["running_accuracy"].compute([1] * 100 + [0] * 100)
        steady = METRICS["running_accuracy"].compute([1, 0] * 100)
        assert drifting["volatility"] > 3 * drifting["volatility_by_chance"]
        assert steady["volatility"] < steady["volatility_by_chance"] == drifting["volatility_by_chance"]
        assert drifting["stability"] < steady["stability"] <= 1

    def test_one_sample_and_bad_scores(self):
        assert METRICS["running_accuracy"].compute([1])["stability"] == 1
        with pytest.raises(ValueError, match="sample 1: score is 2"):
            METRICS["running_accuracy"].compute([1, 2])


ANSWERED = ("vqa_accuracy", "exact_match", "relaxed_accuracy", "anls", "multiple_choice", "pope")


@pytest.mark.parametrize("name", ANSWERED)
def test_empty_predictions_are_wrong_and_reported_apart(name):
    gold = {"pope": "yes", "multiple_choice": "A"}.get(name, "red")
    options = {"choices": [("red", "blue")] * 4} if name == "multiple_choice" else {}
    right = {"multiple_choice": "A"}.get(name, gold)
    computed = METRICS[name].compute(["", None, " \n", right], [[gold]] * 4, **options)
    assert computed[METRICS[name].headline] == 1 / 4
    assert computed["unparseable"] == 3 / 4
    assert [row["score"] for row in computed["per_sample"]] == [0, 0, 0, 1]


@pytest.mark.parametrize("missing", [[], None, [""], ["  "], ""])
@pytest.mark.parametrize("name", ANSWERED)
def test_a_missing_gold_answer_is_named(name, missing):
    options = {"choices": [("red", "blue")] * 2} if name == "multiple_choice" else {}
    with pytest.raises(ValueError, match="sample 1: gold answers are .*; give at least one"):
        METRICS[name].rows(["yes", "yes"], [["yes"], missing] if name == "pope" else [["A"], missing], **options)
    assert without_gold([["a"], missing, "b", [None, "c"]]) == [1]


def test_numbers_of_samples_must_match():
    with pytest.raises(ValueError, match="got 2 predictions and 1 references"):
        METRICS["anls"].rows(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="references are missing"):
        METRICS["anls"].rows(["a"])
    with pytest.raises(ValueError, match="got 0 predictions"):
        METRICS["anls"].compute([], [])


def test_summaries_of_drawn_rows_are_those_of_the_drawn_samples():
    said, true = ["yes", "no", "yes", "maybe"], [["yes"], ["yes"], ["no"], ["no"]]
    drawn = [0, 0, 2, 3, 1]
    rows = METRICS["pope"].rows(said, true)
    again = METRICS["pope"].compute([said[place] for place in drawn], [true[place] for place in drawn])
    assert METRICS["pope"].summarize([rows[place] for place in drawn]) == {
        name: value for name, value in again.items() if name != "per_sample"
    }


def inputs_of(name: str) -> dict:
    metric = METRICS[name]
    outputs = ["<think>star red. It is red</think><answer>red</answer>", "blue"]
    made = {"predictions": [1.0, 0.0] if name == "running_accuracy" else outputs}
    if name == "multiple_choice":
        made |= {"predictions": ["A", "B"], "choices": [["red", "blue"]] * 2, "references": [["A"], ["A"]]}
    elif name == "pope":
        made |= {"predictions": ["yes", "no"], "references": [["yes"], ["yes"]]}
    elif metric.reference == "caption":
        made["references"] = ["scene: top-left star red"] * 2
    elif metric.reference == "objects":
        made["references"] = [["star"], []]
    elif metric.reference == "text":
        made["references"] = ["star red", "blue star"]
    elif metric.reference:
        made["references"] = [["red", "blue"], ["blue"]]
    return made


def module_of(family: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{family}_metric", REPO_ROOT / "metrics" / family / f"{family}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# By metric, the `evaluate` module that it is a configuration of.
FAMILIES = {}
for folder in sorted((REPO_ROOT / "metrics").iterdir()):
    FAMILIES |= dict.fromkeys(module_of(folder.name).CITATIONS, folder.name)


def test_every_metric_is_an_evaluate_module():
    assert sorted(METRICS) == sorted(FAMILIES)


@pytest.mark.parametrize("family", sorted(set(FAMILIES.values())))
def test_a_module_without_a_configuration_names_those_that_there_are(family, monkeypatch, tmp_path):
    monkeypatch.chdir(REPO_ROOT)
    of_family = ", ".join(name for name in METRICS if FAMILIES[name] == family)
    with pytest.raises(ValueError, match="config_name is 'default'; pass one of ") as error:
        evaluate.load(f"metrics/{family}", cache_dir=str(tmp_path))
    assert all(name in str(error.value) for name in of_family.split(", "))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_evaluate_loads_the_metric_offline(name, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network use: {args}")

    for function in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, function, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(REPO_ROOT)
    metric = evaluate.load(f"metrics/{FAMILIES[name]}", name, cache_dir=str(tmp_path))
    assert metric.description
    assert "per_sample" in metric.inputs_description
    made = inputs_of(name)
    computed = metric.compute(**made)
    expected = METRICS[name].compute(made.pop("predictions"), made.pop("references", None), **made)
    assert computed == expected
    assert METRICS[name].headline in computed
    assert len(computed["per_sample"]) == 2
    assert os.getcwd() == str(REPO_ROOT)
