"""Reading what teachers say, and the rules that accept or reject it."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siq_vl.distill.budget import BudgetLimits
from siq_vl.distill.options import parse_options
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import TEMPLATES, Prompts, families
from siq_vl.distill.questions import PROMPT_TASKS, TraceQuestion, figure_questions
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.teachers.base import TeacherLost
from siq_vl.distill.teachers.oracle import _FAULTS, FiguresTeacher
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.verification import RULES, RuleInput, Verification, false_statements, loops, pieces
from siq_vl.distill.yields import precision_and_recall, store_yield
from siq_vl.parsing.answers import agrees, final_answer, number_in, parse_trace


@pytest.mark.parametrize(
    ("text", "rationale", "answer"),
    [
        ("<think>tea 4. ham 7</think><answer>11</answer>", "tea 4. ham 7", "11"),
        ("The bar is 7.</think>\n\nThe answer is **7**.", "The bar is 7.", "7"),  # the tag's opening was in the prompt
        ("<think>a</think>\n\\[ \\boxed{\\frac{1}{2}} \\]", "a", "1/2"),
        ("<think>first this</think>\nIt is red, I see.\nred", "first this", "red"),
        ("<think>still going", "still going", ""),
        ("Tea is 4 and ham is 7. So the answer is 11.", "Tea is 4 and ham is 7.", "11"),
        ("We add.\n\n**Final Answer:** $1,200", "We add.", "$1,200"),
        ("We add.\n\nAnswer\n7", "We add.", "7"),
        ("x = 3. Then \\boxed{12.5}", "x = 3. Then", "12.5"),
        ("Step 1: look. The correct answer is (B) a cat, because it purrs.", "Step 1: look.", "(B) a cat"),
        ("The value is 3.5. The answer is 3.5 because of the label.", "The value is 3.5.", "3.5"),
        ("no idea at all", "no idea at all", ""),
        ("", "", ""),
    ],
)
def test_parse_trace(text, rationale, answer):
    parsed = parse_trace(text)
    assert (parsed.rationale, parsed.answer) == (rationale, answer)


def test_the_last_named_answer_counts():
    assert final_answer("The answer is 3. Wait, no. The answer is 4.") == "4"
    assert final_answer("The answer is hard to see") != ""
    assert final_answer("An answerable question") == ""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", (7.0, "")), ("about $1,200", (1200.0, "")), ("12 cm", (12.0, "cm")), ("45%", (45.0, "%")), ("-3.5", (-3.5, "")),
        ("1/2", (0.5, "")), ("1.2 million", (1.2e6, "")), ("seven apples", (7.0, "apples")), ("\u22123", (-3.0, "")),
        ("2019-2020", None), ("3 and 4", None), ("red", None), ("1/0", None), ("", None), ("12:30", None), ("B2", None),
    ],
)  # fmt: skip
def test_number_in(text, number):
    assert number_in(text) == (None if number is None else (pytest.approx(number[0]), number[1]))


@pytest.mark.parametrize(
    ("answer", "golds", "options", "expected"),
    [
        ("7.0", "7", {}, True),
        ("7.0", "7", {"match": "exact"}, False),
        ("1,200", "1200", {}, True),
        ("0.45", "45%", {}, True),
        ("12 cm", "12", {}, True),
        ("12 cm", "12 m", {}, False),
        ("13", "12", {}, False),
        ("105", "100", {"match": "relaxed"}, True),
        ("106", "100", {"match": "relaxed"}, False),
        ("105", "100", {}, False),
        ("the red ball", "red ball", {}, True),
        ("green", ("red", "green"), {}, True),
        ("blue", ("red", "green"), {}, False),
        ("Yes, it is.", "yes", {"kind": "yes_no"}, True),
        ("true", "no", {"kind": "yes_no"}, False),
        ("B", "(b) cat", {"kind": "choice"}, True),
        ("cat", "B", {"kind": "choice", "choices": ("dog", "cat")}, True),
        ("dog", "B", {"kind": "choice", "choices": ("dog", "cat")}, False),
        ("apple", "A", {"kind": "choice"}, False),
        ("", "", {}, False),
    ],
)
def test_agrees(answer, golds, options, expected):
    assert agrees(answer, golds, **options) is expected


def test_agrees_refuses_unknown_settings():
    with pytest.raises(ValueError, match="kind is 'colour'; it must be one of"):
        agrees("a", "a", kind="colour")
    with pytest.raises(ValueError, match="match is 'fuzzy'"):
        agrees("a", "a", match="fuzzy")


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 7", "2 x 3 = 6", "12 / 48 = 25%", "1/3 = 0.33", "10 / 3 ≈ 3.2", "(3 + 4) * 2 = 14", "$1,200 - $200 = $1,000",
        "3 apples + 4 apples = 7 apples", "5 plus 6 equals 11", "\\frac{6}{3} = 2", "7 > 4", "3 < 4", "2019-2020 is 5 points",
        "20% * 50 = 10", "1 + 2 + 3 = 6", "-3 + 5 = 2", "Total: 5\n- 3 = the first", "a -> b <- c", "2 + 2 = 2 * 2", "3 + 4 = 7 + 1 = 8",
    ],
)  # fmt: skip
def test_true_statements_pass(text):
    assert false_statements(text) == []


@pytest.mark.parametrize(
    "text",
    ["3 + 4 = 8", "so 12 - 5 = 6.", "4 > 7", "9 <= 8", "10 / 4 = 2.6", "5 plus 6 equals 12", "50% * 50 = 20", "3 + 4 = 7 + 1 = 9"],
)  # fmt: skip
def test_false_statements_are_found(text):
    assert len(false_statements(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "1 ",
        "1-",
        "(",
        "1,",
        "1 + ",
        "1 a",
        "$",
        "123,",
        "< ",
        "the answer ",
        "the answer is ",
        "\n",
        "\\boxed{",
        "I can ",
        "-",
        "*",
        "* ",
        "\"'",
        " ",
    ],
)
def test_pathological_texts_are_read_to_their_end(text):
    # With a regular expression that backtracks, any of these takes minutes.
    text *= 20000
    assert parse_trace(text).well_formed is False
    assert parse_trace(f"<think>a</think><answer>x{text}y</answer>").answer.endswith("y")
    assert parse_trace(f"x{text}the answer is x{text}y. So{text}").rationale.startswith("x")
    false_statements(text)
    Verification().judge(trace_of(text, finish_reason="length"))


def test_loops():
    assert loops(pieces("tea 4. " * 8))
    assert loops(pieces("I read it. " + "The value is high, so the value is large. " * 5))
    assert not loops(pieces("tea 4, ham 7, jam 12, rice 3. 4 + 7 = 11. 12 - 3 = 9"))
    assert not loops(pieces("values: " + ", ".join(str(number * number) for number in range(200))))
    counted = ". ".join(f"Step {number}: look at the picture again and read it" for number in range(30))
    assert loops(pieces(counted))


def trace_of(output: str, gold: str = "7", **changes) -> RuleInput:
    base = RuleInput("How many?", (gold,) if gold else (), "open", (), output, "stop", False, "")
    return replace(base, **changes)


GOOD = "<think>The chart shows 3 for tea and 4 for ham. 3 + 4 = 7.</think><answer>7</answer>"
BAD = {
    "parse": trace_of("seven"),
    "truncated": trace_of(GOOD, finish_reason="length"),
    "refusal": trace_of("<think>I'm sorry, but I cannot see the image.</think><answer>7</answer>"),
    "repetition": trace_of(f"<think>{'tea 3. ' * 12}3 + 4 = 7</think><answer>7</answer>"),
    "answer": trace_of(GOOD, gold="9"),
    "arithmetic": trace_of("<think>2 + 4 = 7</think><answer>7</answer>"),
    "contradiction": trace_of("<think>tea 3. ham 4. 3 + 4 = 7</think><answer>8</answer>", gold=""),
    "length": trace_of(f"<think>{' '.join(map(str, range(3000)))}</think><answer>7</answer>"),
    "language": trace_of("<think>首先观察图片中的内容，然后读取每一个数值。3 + 4 = 7</think><answer>7</answer>"),
    "hint": trace_of("<think>The correct answer was given as 7.</think><answer>7</answer>", hinted=True),
    "markup": trace_of("<think>7 <think>or 8</think><answer>7</answer>"),
}


def test_every_rule_has_a_bad_example():
    assert BAD.keys() == RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_rejects_and_can_be_left_out(rule):
    assert Verification().judge(trace_of(GOOD)) == []
    assert rule in Verification().judge(BAD[rule])
    assert rule not in Verification(skip_rules=[rule]).judge(BAD[rule])


def test_rules_do_not_overreach():
    rules = Verification()
    third = "<think>The first bar is 7. I cannot see a third bar, so the largest is 7.</think><answer>7</answer>"
    assert rules.judge(trace_of(third)) == []
    word = "<think>The sign reads 出口 in red letters above the door, which means exit.</think><answer>exit</answer>"
    assert rules.judge(trace_of(word, gold="exit")) == []
    french = (
        "<think>Le graphique montre quatre mois, et la valeur de janvier est de sept points.</think><answer>7</answer>"
    )
    assert rules.judge(trace_of(french)) == ["language"]
    assert Verification(language="fr").judge(trace_of(french)) == []
    assert rules.judge(trace_of("", error="no answer in 2 s")) == ["teacher_error"]
    unlabelled = trace_of(GOOD, gold="")
    assert rules.judge(unlabelled) == []


@pytest.mark.parametrize(
    "output",
    [
        "<think>It is 7.<|im_end|>\n<|im_start|>user\nThanks</think><answer>7</answer>",
        "<think>It is 7.</think><answer>7<|endoftext|></answer>",
        "<think>It is <answer>7</answer>, or so.</think><answer>7</answer>",
        "<think>It is 7.</think><answer>7</answer><think>No, 8.</think><answer>8</answer>",
        "<think>It is 7.</think><answer>7</answer> Or rather <answer>8</answer>",
        "<think>It is <think>7</think>.</think><answer>7</answer>",
        "It is 7.</think>So it is.</think>",
        "<think>The tag </answer> is shown.</think><answer>7</answer>",
    ],
)
def test_tags_and_special_tokens_are_not_taught(output):
    assert "markup" in Verification().judge(trace_of(output))
    assert "markup" not in Verification(skip_rules=["markup"]).judge(trace_of(output))


@pytest.mark.parametrize(
    "output",
    [
        GOOD,
        f"Sure! {GOOD} I hope that this helps.",
        "The chart shows 3 for tea and 4 for ham.\n3 + 4 = 7.\n</think>\n\n\\boxed{7}",
        "The sign says a < b | c > d, and |x| is 7.\n\nThe answer is 7.",
        "<think>The list has <b>7</b> lines, as in <|> or <| a |>.</think><answer>7</answer>",
    ],
)
def test_what_only_looks_like_mark_up_is_taught(output):
    assert Verification().judge(trace_of(output)) == []


def test_a_store_is_judged_again_when_there_are_new_rules(tmp_path):
    """A store of an earlier version, whose settings name no rules."""
    traces_of_oracle(tmp_path, 1)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["verification"]["rules"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with TraceStore(tmp_path) as store:
        (shard,) = store.shards()
        table = pq.read_table(shard)
        outputs = [f"{text}<answer>8</answer>" for text in table["output"].to_pylist()]
        store.rewrite(shard, table.set_column(table.schema.get_field_index("output"), "output", pa.array(outputs)))
        assert update_verdicts(store, Verification(), Selection()) == (3, 0)
    assert set(read_traces(tmp_path, kept=False)["rejected_by"][0]) == {"markup"}


@pytest.mark.parametrize("old", [["--max_length", "7"], ["--max_length=7"], ["--min_length", "7"]])
def test_bounds_have_their_old_names_too(old, caplog):
    """Words here, and tokens where models are trained, had one name."""
    name = old[0].partition("=")[0]
    options = parse_options("", old)
    assert (options.verification.max_words, options.verification.min_words) in ((7, 1), (2048, 7))
    assert f"{name} is deprecated: it counts words, and is called {name[:6]}words now" in caplog.text
    caplog.clear()
    assert parse_options("", ["--max_words", "7"]).verification.max_words == 7 and not caplog.text


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match="'typo' is no rule; the rules are parse"):
        Verification(skip_rules=["typo"])
    with pytest.raises(ValueError, match="the bounds must rise"):
        Verification(min_words=5, max_words=4)
    with pytest.raises(ValueError, match="language is 'klingon'"):
        Verification(language="klingon")
    with pytest.raises(ValueError, match="a budget of money needs prices"):
        BudgetLimits(max_cost=1.0)


def traces_of_oracle(folder: Path, count: int, **oracle) -> None:
    rules = Verification()
    with TraceStore(folder) as store:
        record_rules(store, rules)
        for style in ("structured", "terse", "text_first"):
            Run(FiguresTeacher(style, **oracle), Prompts(), store, rules, progress=False).over(figure_questions(count))
        update_verdicts(store, rules, Selection())


def test_precision_and_recall_against_the_oracle(tmp_path):
    """Faults that show in text or answer are all caught and nothing else is; a misreading that leaves the answer right is not."""
    traces_of_oracle(tmp_path, 500, error_rate=0.15)
    truth = store_yield(tmp_path).truth
    assert truth.keys() == {"", *_FAULTS}
    made = sum(count for count, _ in truth.values())
    faulty = made - truth[""][0]
    assert made == 1500
    assert abs(faulty / made - 0.15) < 4 * (0.15 * 0.85 / made) ** 0.5
    assert truth[""][1] == 0
    for kind, (count, caught) in truth.items():
        assert caught == (0 if kind in ("", "misread beside the point") else count)
    precision, recall = precision_and_recall(store_yield(tmp_path))
    assert precision == 1.0
    assert recall == pytest.approx(1 - truth["misread beside the point"][0] / faulty)


def test_the_oracle_is_right_unless_asked(tmp_path):
    traces_of_oracle(tmp_path, 60)
    assert store_yield(tmp_path).truth == {"": (180, 0)}
    rows = read_traces(tmp_path, kept=False)
    assert all(agrees(row["answer"], row["golds"], kind=row["kind"], match="exact") for row in rows)
    assert set(rows["teacher_kind"]) == {"figures"}


def test_the_rules_cannot_see_who_spoke_or_what_was_put_in():
    assert not {"injected", "teacher", "teacher_kind", "revision", "sampling"} & {
        field.name for field in fields(RuleInput)
    }


def test_the_oracle_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="error_rate is 2"):
        FiguresTeacher(error_rate=2)
    with TraceStore(tmp_path) as store, pytest.raises(TeacherLost, match="knows drawn figures alone"):
        Run(FiguresTeacher(), Prompts(), store, Verification(), progress=False).over([TraceQuestion("1", "What?")])
    assert store_yield(tmp_path).made == 0


@pytest.mark.parametrize("family", families())
def test_every_family_has_a_versioned_prompt_for_every_task(family):
    question = TraceQuestion("1", "How many <b>?", ("GOLD",), choices=("one", "two"))
    versions = Prompts(family).versions
    assert set(versions) == set(PROMPT_TASKS)
    assert all(name.startswith(f"{family}/{task}@1-") for task, name in versions.items())
    for task in PROMPT_TASKS:
        asked = replace(question, task=task)
        shown = Prompts(family).render(asked)
        assert "How many <b>?" in shown
        assert "(B) two" in shown
        assert "GOLD" not in shown
        assert "GOLD" in Prompts(family, hint=True).render(asked)
        assert "about 90 words" in Prompts(family, target_words=90).render(asked)
        assert (
            Prompts(family, hint=True).versions[task]
            != versions[task]
            != Prompts(family, target_words=90).versions[task]
        )


def test_prompts_of_earlier_stores_are_still_the_same_prompts():
    """Traces hang on these names: one that changed without its words would have every store asked again."""
    assert Prompts("default").versions["general"] == "default/general@1-0bdb2034"
    assert Prompts("qwen3_vl_instruct").versions["general"] == "qwen3_vl_instruct/general@1-0bdb2034"
    assert Prompts("qwen3_vl_thinking").versions["general"] == "qwen3_vl_thinking/general@1-92e8ff0d"


def test_editing_a_prompt_changes_its_version(tmp_path):
    for path in TEMPLATES.rglob("*.jinja"):
        copy = tmp_path / path.relative_to(TEMPLATES)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    before = Prompts("default", folder=tmp_path).versions
    (tmp_path / "_tags.jinja").write_text("Say something else.")
    assert all(before[task] != version for task, version in Prompts("default", folder=tmp_path).versions.items())
    (tmp_path / "default" / "chart.jinja").write_text("no version")
    with pytest.raises(ValueError, match="must begin with a line"):
        _ = Prompts("default", folder=tmp_path).versions
    with pytest.raises(ValueError, match="prompt family 'typo' has no general.jinja"):
        Prompts("typo")
    with pytest.raises(ValueError, match="no gold answer to give as a hint"):
        Prompts(hint=True).render(TraceQuestion("1", "What?"))
