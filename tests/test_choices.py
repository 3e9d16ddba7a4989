"""Which traces are kept, drawn, agreed with and paid for, on small cases worked out by hand."""

import asyncio
from random import Random
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import filter_repo_objects

from siq_vl.distill import card, choice, selection
from siq_vl.distill import training_rows as training
from siq_vl.distill.budget import Budget, BudgetLimits
from siq_vl.distill.choice import TraceChoice
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import EncodedPicture, TraceQuestion, figure_questions
from siq_vl.distill.schema import TokensSpent
from siq_vl.distill.selection import Selection, _Candidate, update_verdicts
from siq_vl.distill.teachers.base import Teacher, TeacherReply, TeacherRequest
from siq_vl.distill.teachers.oracle import FiguresTeacher
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.verification import Verification
from siq_vl.distill.yields import StoreYield, TeacherYield, cost_table, precision_and_recall, store_yield

# Selection


def mark(place: int, answer: str = "7", *, teacher: int = 0, tokens: int = 5, **options) -> _Candidate:
    return _Candidate(place, 0, teacher, place, answer, bool(answer), tokens, "open", **options)


def test_agreement_is_with_the_others_that_answered():
    group = [mark(0, "7"), mark(1, "seven"), mark(2, "8"), mark(3, ""), mark(4, "9")]
    selection._compare_answers(group, Selection())
    assert [each.agreement for each in group if each.answered] == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert np.isnan(group[3].agreement)
    group = [mark(0, "7"), mark(1, "7"), mark(2, "8")]
    selection._compare_answers(group, Selection(min_agreement=0.5))
    assert [each.rejected_by for each in group] == [
        [],
        [],
        ["agreement"],
    ]  # one half is enough where one half is asked for


def test_the_best_is_the_most_agreed_with_then_the_nearest_to_the_target():
    def best(marks: list[_Candidate], target: int) -> set[int]:
        selection._reject_all_but_best(marks, target)
        return {each.place for each in marks if not each.rejected_by}

    assert best([mark(0, agreement=0.5), mark(1, agreement=1.0, tokens=99), mark(2, agreement=0.5)], 5) == {1}
    assert best([mark(0, tokens=3), mark(1, tokens=9), mark(2, tokens=30)], 10) == {1}
    assert best([mark(0, tokens=3), mark(1, tokens=2)], 0) == {1}
    assert best([mark(0, tokens=4), mark(1, tokens=4)], 0) == {0}
    assert best([mark(0, teacher=0), mark(1, teacher=1), mark(2, teacher=1, tokens=4)], 0) == {0, 2}
    assert best([mark(0, rejected_by=["parse"], tokens=1), mark(1)], 0) == {1}


class Scripted(Teacher):
    kind = "figures"
    name = "scripted"

    def __init__(self, said: dict[str, list[TeacherReply]], name: str = "scripted"):
        self.said, self.name = said, name

    def settings(self) -> dict:
        return {}

    async def generate(self, asked):
        return [self.said[one.question.id][one.repeat] for one in asked]


def store_of(folder, said: dict[str, list[TeacherReply]], *, rules=None, chosen=None, name="scripted", **options):
    questions = [TraceQuestion(id, f"What is {id}?", ("7",)) for id in said]
    rules = rules or Verification(language="")
    with TraceStore(folder) as store:
        Run(
            Scripted(said, name),
            Prompts(**options),
            store,
            rules,
            samples=len(next(iter(said.values()))),
            progress=False,
        ).over(questions)
        update_verdicts(store, rules, chosen or Selection())
    return {(row["sample_id"], row["repeat"]): row for row in read_traces(folder, kept=False)}


def trace(reasoning: str, answer: str = "7", **options) -> TeacherReply:
    return TeacherReply(f"<think>{reasoning}</think><answer>{answer}</answer>", **options)


LONG = "First we read every number on the chart then we add the third one to the fifth one and so we find seven"


@pytest.mark.parametrize(
    ("scope", "second", "elsewhere"), [("question", True, False), ("all", True, True), ("none", False, False)]
)
def test_near_duplicates_of_accepted_traces_go(tmp_path, scope, second, elsewhere):
    said = {
        "a": [trace(LONG, "8"), trace(LONG), trace(LONG), trace("Quite another way to think about the numbers that are shown here")],
        "b": [trace(LONG), trace("One two three four five six seven eight nine"), trace("x", error="lost"), trace("y z", error="lost")],
    }  # fmt: skip
    found = store_of(tmp_path, said, chosen=Selection(duplicates=scope))
    assert "duplicate" not in found["a", 0]["rejected_by"]  # it is rejected for its answer, and makes no duplicates
    assert found["a", 1]["rejected_by"] == []
    assert ("duplicate" in found["a", 2]["rejected_by"]) == second
    assert found["a", 3]["rejected_by"] == []
    assert ("duplicate" in found["b", 0]["rejected_by"]) == elsewhere
    assert found["b", 1]["verdict"] == "kept" and found["b", 2]["rejected_by"] == ["teacher_error"]


def test_a_trace_that_failed_agrees_with_none(tmp_path):
    said = {"a": [trace("one two"), trace("three four"), trace("five six", "8", error="lost")]}
    found = store_of(tmp_path, said)
    assert [found["a", repeat]["agreement"] for repeat in range(3)] == [1.0, 1.0, None]


def test_half_alike_is_no_duplicate():
    one, other = LONG.split(), LONG.split()
    other[10:] = [f"other{place}" for place in range(12)]
    first, second = (selection._signature(" ".join(words)) for words in (one, other))
    runs = [{tuple(words[start : start + 3]) for start in range(len(words) - 2)} for words in (one, other)]
    shared = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    assert first.jaccard(second) == pytest.approx(shared, abs=0.12)
    assert selection._signature(" ".join(reversed(one))).jaccard(first) < 0.1  # runs of words, not words


def test_rules_that_have_changed_judge_again_and_selection_is_undone(tmp_path):
    said = {"a": [trace("short"), trace(LONG)]}
    strict = Verification(language="", min_length=5)
    found = store_of(tmp_path, said, rules=strict, chosen=Selection(keep="best"), hint=True)
    assert found["a", 0]["rejected_by"] == ["length"] and found["a", 1]["verdict"] == "kept"
    with TraceStore(tmp_path) as store:
        update_verdicts(store, Verification(language=""), Selection(keep="best"))
        settings = store.read_settings()
    assert settings["selection"]["keep"] == "best" and settings["verification"]["min_tokens"] == 1
    found = {row["repeat"]: row for row in read_traces(tmp_path, kept=False)}
    assert found[0]["rejected_by"] == [] and found[1]["rejected_by"] == ["not_best"]
    assert found[0]["hinted"] and found[1]["hinted"]
    with TraceStore(tmp_path) as store:
        update_verdicts(store, Verification(language=""), Selection())
    assert [row["rejected_by"] for row in read_traces(tmp_path, kept=False)] == [[], []]


# Numbers of a store


def test_a_store_adds_up(tmp_path):
    first = {"a": [trace("a b", prompt_tokens=10, completion_tokens=3, seconds=2.0), trace("a b c d e f g h i")]}
    first |= {"b": [trace("a b", "8", injected="wrong answer"), trace("a b", prompt_tokens=5)]}
    first |= {"c": [TeacherReply("", error="lost"), trace("k l m", "8")]}
    store_of(tmp_path, first)
    store_of(tmp_path, {"a": [trace("p q r")], "b": [trace("s t u")], "c": [trace("v w")]}, name="other")
    found = store_yield(tmp_path)
    made = found.teachers["scripted"]
    assert (made.made, made.kept, made.read, made.written, made.seconds) == (6, 3, 15, 3, 2.0)
    assert made.lengths == {0: 4, 8: 1}  # of what was said at all
    assert found.pairs == {("other", "scripted"): (2, 1)}  # first samples, where both answered
    assert found.truth["wrong answer"] == (1, 1)
    line = cost_table(found).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["scripted", "15", "3", "0", "0.33"]
    with TraceStore(tmp_path) as store:
        spent, other = store.spent("scripted"), store.spent("other")
        assert spent == TokensSpent(read=15, written=3, replies=2, unread=3, unwritten=4)
        assert other == TokensSpent(unread=3, unwritten=3)
        ids = len(store.trace_ids())
        assert store.drop_failed() == 1 and len(store.trace_ids()) == ids - 1
    assert not any(read_traces(tmp_path, kept=False)["error"])
    assert set(read_traces(tmp_path)["verdict"]) == {"kept"}


def test_precision_and_recall_are_of_rejected_and_of_faulty():
    summary = StoreYield({"figures-a": TeacherYield()}, truth={"": (20, 2), "loop": (5, 4), "wrong": (5, 3)})
    assert precision_and_recall(summary) == (7 / 9, 7 / 10)


def test_duplicates_are_not_what_verification_caught(tmp_path):
    said = {"a": [trace(LONG, injected="harmless"), trace(LONG, injected="harmless")]}
    found = store_of(tmp_path, said)
    assert found["a", 1]["rejected_by"] == ["duplicate"]
    assert store_yield(tmp_path).truth == {"harmless": (2, 0)}


def test_a_hint_and_a_repeat_are_parts_of_what_a_trace_is(tmp_path):
    said = {"a": [trace(LONG), trace("Another way to seven")]}
    store_of(tmp_path, said)
    store_of(tmp_path, said, hint=True)
    found = read_traces(tmp_path, kept=False)
    assert len(set(found["trace_id"])) == 4 and sorted(found["hinted"]) == [False, False, True, True]


# Training rows


def traced(index: int, question: str, teacher: str = "a", length: int = 0) -> TraceChoice:
    return TraceChoice(index, question, teacher, length)


def test_teachers_are_drawn_by_weight_and_no_trace_twice():
    group = [traced(0, "q", "a"), traced(1, "q", "b"), traced(2, "q", "b")]
    weights = {"a": 3.0, "b": 1.0}
    first = [choice.draw_by_teacher(group, weights, 1, Random(seed))[0].teacher for seed in range(400)]
    assert 270 < first.count("a") < 330  # 300, four standard deviations of 8.7
    for seed in range(20):
        assert sorted(each.index for each in choice.draw_by_teacher(group, weights, 5, Random(seed))) == [0, 1, 2]


def test_what_is_drawn_hangs_on_the_seed_and_what_answers_directly_does_not():
    group = [traced(2 * question + place, f"q{question}", "ab"[place]) for question in range(40) for place in range(2)]
    weights = {"a": 1.0, "b": 1.0}
    first, second = (choice.choose(group, weights, 1, 0.5, seed) for seed in (0, 1))
    assert [trace.index for trace, _ in first] != [trace.index for trace, _ in second]
    assert [direct for _, direct in first] == [direct for _, direct in second]
    assert 10 < sum(direct for _, direct in first) < 30
    parts = choice.split_by_question(group, 0.25, seed=0)
    sides = [{trace.sample_id for trace in parts[held_out]} for held_out in (False, True)]
    assert not sides[0] & sides[1] and 2 <= len(sides[1]) <= 20 < len(sides[0])
    assert [trace.sample_id for trace in choice.split_by_question(group, 0.25, seed=1)[True]] != [
        t.sample_id for t in parts[True]
    ]


def test_an_epoch_is_a_random_part_and_a_curriculum_grows():
    chosen = [
        choice.PlannedRow(traced(index, f"q{index}", length=(7 * index) % 30), index % 3 == 0) for index in range(30)
    ]
    part = choice.order_epoch(list(chosen), "none", 0, 10)
    indices = [trace.index for trace, _ in part]
    assert len(part) == 10 and indices == sorted(indices) != list(range(10))
    growing = choice.order_epoch(list(chosen), "length", 0, None)
    lengths = [trace.length for trace, direct in growing if not direct]
    assert lengths == sorted(lengths) and len(set(lengths)) > 5
    direct = [place for place, (_, direct) in enumerate(growing) if direct]
    assert direct != list(range(0, 30, 3)) and len(direct) == 10  # drawn, not where they were


def test_choices_are_lettered_from_a():
    assert training.student_question({"question": "Which?", "choices": ["tea", "milk"]}) == "Which?\nA. tea\nB. milk"


@pytest.mark.parametrize("given", ["a=0", "a=-1", "a=x"])
def test_a_teacher_without_weight_is_refused(given):
    with pytest.raises(ValueError, match="a weight above 0"):
        TraceArguments(traces="store", teachers=[given])


@pytest.mark.parametrize("length", [13, 14, 15])
def test_a_rationale_of_the_bound_is_trained_on(length):
    row = {"verdict": "kept", "rationale": "a", "answer": "b", "rejected_by": []}
    config = TraceArguments(traces="store", max_rationale_tokens=14)
    if length > 14:
        with pytest.raises(training.Dropped, match="longer"):
            training._check(row, length, config)
    else:
        training._check(row, length, config)


def test_direct_rows_answer_with_the_gold_answer_and_do_not_think(tmp_path):
    teacher = training._TeacherSource("a", tmp_path, None)
    row = {"golds": ["red"], "answer": "Red.", "rationale": "It is red.", "question": "?", "choices": [], "images": []}
    direct, whole = (teacher.conversation({**row, "direct": each}) for each in (True, False))
    assert direct.texts("assistant") == ["<think></think><answer>red</answer>"]
    assert direct.template_options == {"enable_thinking": False}
    assert whole.texts("assistant") == ["<think>It is red.</think><answer>Red.</answer>"]
    assert whole.template_options == {"enable_thinking": True}


# Budget


def test_money_counts_reading_and_writing_at_their_prices_a_million():
    budget = Budget(BudgetLimits(max_cost=1.0, price_in=2.0, price_out=10.0), max_new_tokens=100)
    asyncio.run(budget.spend(TeacherReply("", prompt_tokens=200_000, completion_tokens=30_000)))
    assert budget.spent_money == pytest.approx(0.4 + 0.3)
    assert (budget.spent_in, budget.spent_out) == (200_000, 30_000)


def test_a_request_is_granted_while_the_longest_reply_fits():
    async def reserved() -> list[int]:
        budget = Budget(BudgetLimits(max_tokens=1000), max_new_tokens=100)
        budget.carry_over(TokensSpent(200, 0, 2))  # 100 tokens read a reply
        granted = [await budget.reserve(9)]  # 800 are left: four replies of 200
        for read in (100, 0, 0, 0):
            if read:
                await budget.spend(TeacherReply("", prompt_tokens=read, completion_tokens=read // 2))
            else:
                await budget.release()
        granted.append(await budget.reserve(9))  # 650 are left
        for _ in range(granted[-1]):
            await budget.release()
        budget.count(600, 0)
        return [*granted, await budget.reserve(1)]

    assert asyncio.run(asyncio.wait_for(reserved(), 10)) == [4, 3, 0]


def test_pictures_are_kept_where_they_shall_be(tmp_path, make_image):
    question = TraceQuestion("a", "?", ("7",), sources=(EncodedPicture.encode(make_image(0)),))
    for embed in (True, False):
        with TraceStore(tmp_path / str(embed)) as store:
            Run(Scripted({"a": [trace("x")]}), Prompts(), store, Verification(), embed=embed, progress=False).over(
                [question]
            )
            store.seal()
            (shard,) = store.shards()
            assert bool(pq.read_table(shard)["images"].to_pylist()[0]) == embed


def test_a_hint_is_a_part_of_the_id_whatever_the_prompt(tmp_path):
    question = TraceQuestion("a", "?", ("7",))
    ids = set()
    with TraceStore(tmp_path) as store:
        for hint in (True, False):
            prompts = SimpleNamespace(versions={"general": "always the same"}, hint=hint)
            (job,) = Run(Scripted({}), prompts, store, Verification(), progress=False).missing([question])
            ids.add(job.id)
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("made", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (9_999, "1K<n<10K"), (10_000, "10K<n<100K")]
)
def test_the_card_says_how_large_a_store_is(tmp_path, monkeypatch, made, size):
    monkeypatch.setattr(card, "store_yield", lambda folder: StoreYield({"a": TeacherYield(made=made, kept=made)}))
    hinted = {"teacher": "a", "revision": "1", "prompt": "p", "sampling": "{}", "hinted": True}
    monkeypatch.setattr(card, "sealed_traces", lambda folder, columns: [hinted, {**hinted, "hinted": False}])
    (tmp_path / "settings.json").write_text("{}")
    text = card.write_card(tmp_path).read_text(encoding="utf-8")
    assert f"size_categories:\n- {size}\n" in text and f"{made} traces" in text
    assert text.count("gold answer shown") == 1


def test_neither_the_journal_nor_anything_else_is_pushed(tmp_path, monkeypatch):
    store_of(tmp_path, {"a": [trace(LONG)]})
    (tmp_path / "report.html").write_text("page")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "journal" / "00009.jsonl").write_text("")
    pushed = {}
    api = SimpleNamespace(
        create_repo=lambda name, **options: pushed.update(options),
        upload_folder=lambda **options: pushed.update(options) or "address",
    )
    monkeypatch.setattr(card, "HfApi", lambda: api)
    card.push_to_hub(tmp_path, "me/traces")
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=pushed["allow_patterns"]))
    assert sent == {"data/traces-00000.parquet", "README.md", "report.html", "settings.json"}
    assert pushed["private"] is True and pushed["repo_type"] == "dataset"


def test_faults_of_the_oracle_hang_on_its_seed_and_on_the_repeat():
    def injected(seed: int, repeat: int) -> list[str]:
        teacher = FiguresTeacher("terse", error_rate=0.5, seed=seed)
        asked = [TeacherRequest(question, [], "?", repeat) for question in figure_questions(20)]
        return [said.injected for said in asyncio.run(teacher.generate(asked))]

    first = injected(0, 0)
    assert first == injected(0, 0) and len({tuple(first), tuple(injected(1, 0)), tuple(injected(0, 1))}) == 3
    assert 3 < first.count("") < 17


def test_a_key_is_not_carried_to_where_a_server_points():
    sent = {}

    class Session:
        def post(self, address, **options):
            sent.update(options)
            raise OSError("not asked at all")

    teacher = ServerTeacher("model", ServerSettings(attempts=1))
    teacher._session = Session()
    with pytest.raises(OSError, match="not asked"):
        asyncio.run(teacher._post("http://somewhere/v1", b"{}"))
    assert sent["allow_redirects"] is False
