"""The store, the sources of questions, selection among traces, the page, the card, and the command."""

import base64
import io
import json
import os
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image
from processes import CONTEXT

from siq_vl.distill import card
from siq_vl.distill.card import push_to_hub, write_card
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import EncodedPicture, ImagePolicy, TraceQuestion, figure_questions, file_questions
from siq_vl.distill.schema import FEATURES
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.store_page import gallery, write_page
from siq_vl.distill.teachers.base import Teacher, TeacherReply
from siq_vl.distill.teachers.oracle import FiguresTeacher
from siq_vl.distill.teachers.server import data_url
from siq_vl.distill.traces import TraceStore, read_traces, trace_id
from siq_vl.distill.verification import Verification
from siq_vl.distill.yields import store_yield

REPO_ROOT = Path(__file__).resolve().parent.parent


class Scripted(Teacher):
    """Says what it is given: by question id, the output of each sample."""

    kind = "figures"
    batch_size = 3

    def __init__(self, name: str, outputs: dict[str, list[str]]):
        self.name, self._outputs, self.asked = name, outputs, []

    def settings(self) -> dict:
        return {}

    async def generate(self, asked):
        self.asked += [(one.question.id, one.repeat) for one in asked]
        return [TeacherReply(self._outputs[one.question.id][one.repeat]) for one in asked]


def said(rationale: str, answer: str) -> str:
    return f"<think>{rationale}</think><answer>{answer}</answer>"


def ask(folder: Path, teacher: Teacher, questions, *, rules=None, selection=None, **options):
    rules = rules or Verification(language="")
    with TraceStore(folder) as store:
        record_rules(store, rules)
        progress = Run(teacher, Prompts(), store, rules, progress=False, **options).over(questions)
        update_verdicts(store, rules, selection or Selection())
    return progress


def rows_of(folder: Path, *columns: str) -> list[dict]:
    return read_traces(folder, kept=False, columns=columns or [name for name in FEATURES if name != "images"]).to_list()


def blank(number: int, **changes) -> dict:
    """A trace that need not mean anything."""
    values = {"string": "", "bool": False, "int32": 0, "int64": 0, "float64": 0.0}
    row = {name: values.get(getattr(kind, "dtype", ""), []) for name, kind in FEATURES.items()}
    return {
        **row,
        "trace_id": f"{number:016x}",
        "sample_id": str(number),
        "verdict": "kept",
        "agreement": None,
        **changes,
    }


# The store


def test_a_trace_is_kept_the_moment_it_is_appended(tmp_path):
    with TraceStore(tmp_path) as store:
        store.append(blank(1, output="a\nb"))
        (journal,) = (tmp_path / "journal").glob("*.jsonl")
        assert json.loads(journal.read_text())["output"] == "a\nb"
    assert not list((tmp_path / "journal").glob("*.jsonl"))
    assert rows_of(tmp_path, "output") == [{"output": "a\nb"}]
    with TraceStore(tmp_path) as store, pytest.raises(ValueError, match="it needs"):
        store.append({"trace_id": "1"})


def test_what_a_killed_process_left_is_sealed_once(tmp_path):
    with TraceStore(tmp_path, rows_per_shard=2) as store:
        for number in range(5):
            store.append(blank(number))
    assert [pq.read_metadata(path).num_rows for path in store.shards()] == [2, 2, 1]
    journal = tmp_path / "journal"
    # Killed before the shard was written: the journal has two traces and half of a third.
    (journal / "00007.jsonl").write_text(
        "".join(json.dumps(blank(number)) + "\n" for number in (5, 6)) + '{"trace_id": "half'
    )
    # Killed after the shard was renamed and before its journal went.
    (journal / "00001.jsonl").write_text("".join(json.dumps(blank(number)) + "\n" for number in (2, 3)))
    # Killed while a shard was being written.
    (tmp_path / "data" / ".traces-00009.parquet.tmp").write_bytes(b"PAR1 half a file")
    with TraceStore(tmp_path) as store:
        assert store.trace_ids() == set(range(7))
        store.append(blank(7))
    ids = [row["trace_id"] for row in rows_of(tmp_path, "trace_id")]
    assert sorted(ids) == [f"{number:016x}" for number in range(8)]
    assert not list((tmp_path / "data").glob(".*"))


def test_one_process_writes_at_a_time(tmp_path):
    with TraceStore(tmp_path), pytest.raises(ValueError, match="is being written by another process"):
        TraceStore(tmp_path)
    TraceStore(tmp_path).close()


def killed_at(folder: str, moment: str) -> None:
    """Append and seal, and die without a word at some moment of sealing."""
    store = TraceStore(Path(folder), rows_per_shard=3)
    for number in range(3 - 1):
        store.append(blank(number))
    if moment == "before the rename":
        os.replace = lambda *paths: os._exit(9)
    elif moment == "after the rename":
        Path.unlink = lambda *path, **options: os._exit(9)
    store.append(blank(2))
    store.close()


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_dying_while_sealing_loses_and_doubles_nothing(tmp_path, moment):
    process = CONTEXT.Process(target=killed_at, args=(str(tmp_path), moment))
    process.start()
    process.join()
    assert process.exitcode == 9
    with TraceStore(tmp_path) as store:
        assert store.trace_ids() == {0, 1, 2}
    assert len(rows_of(tmp_path, "trace_id")) == 3


def test_pictures_and_columns_survive(tmp_path):
    progress = ask(tmp_path, FiguresTeacher("terse"), figure_questions(6))
    assert progress.made == 6
    drawn = {question.id: question for question in figure_questions(6)}
    for source in (
        read_traces(tmp_path),
        load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train"),
    ):
        assert source.features == FEATURES
        assert len(source) == 6
        for row in source:
            question = drawn[row["sample_id"]]
            assert row["images"][0].convert("RGB").tobytes() == question.drawn.image.tobytes()
            assert (row["question"], row["golds"], row["kind"]) == (
                question.question,
                list(question.golds),
                question.kind,
            )
            assert row["prompt"] == Prompts().versions[question.task]
            assert json.loads(row["sampling"]) == {"error_rate": 0.0, "seed": 0, "style": "terse"}
            assert row["output"] == said(row["rationale"], row["answer"])
            assert (row["hinted"], row["injected"], row["verdict"]) == (False, "", "kept")


def test_reading_a_store_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="run `python generate_traces.py --teacher"):
        read_traces(tmp_path)
    ask(tmp_path, Scripted("a", {"1": ["no answer"]}), [TraceQuestion("1", "What?", ("x",))])
    with pytest.raises(ValueError, match="holds no trace that was kept"):
        read_traces(tmp_path)
    assert len(read_traces(tmp_path, kept=False)) == 1


# Doing only what is missing


def test_a_second_run_does_only_what_is_missing(tmp_path):
    questions = [TraceQuestion(str(number), "What?", ("red",)) for number in range(7)]
    outputs = {q.id: [said(f"the ball {q.id} is red {repeat}", "red") for repeat in range(3)] for q in questions}
    first, second = Scripted("one", outputs), Scripted("two", outputs)
    assert ask(tmp_path, first, questions[:4]).made == 4
    progress = ask(tmp_path, first, questions)
    assert (progress.made, progress.skipped) == (3, 4)
    assert ask(tmp_path, second, questions).made == 7
    assert ask(tmp_path, first, questions, samples=3).made == 14
    assert ask(tmp_path, first, questions, samples=3).made == 0
    assert sorted(first.asked) == sorted({(q.id, repeat) for q in questions for repeat in range(3)})
    assert len({row["trace_id"] for row in rows_of(tmp_path)}) == len(rows_of(tmp_path)) == 28


def test_another_way_of_asking_is_another_trace():
    teacher = {"teacher": "a", "prompt": "p@1", "hinted": False}
    ids = [trace_id("1", teacher, 0), trace_id("2", teacher, 0), trace_id("1", teacher, 1)]
    ids += [trace_id("1", {**teacher, "prompt": "p@2"}, 0), trace_id("1", {**teacher, "hinted": True}, 0)]
    assert len(set(ids)) == 5
    assert trace_id("1", dict(reversed(teacher.items())), 0) == ids[0]


def test_a_hint_is_noted(tmp_path):
    question = TraceQuestion("1", "What?", ("red",))
    rules, teacher = Verification(language=""), Scripted("a", {"1": [said("it is red", "red")]})
    with TraceStore(tmp_path) as store:
        Run(teacher, Prompts(hint=True), store, rules, progress=False).over([question])
        Run(teacher, Prompts(), store, rules, progress=False).over([question])
    assert sorted(row["hinted"] for row in rows_of(tmp_path)) == [False, True]


def test_two_questions_of_one_id_are_refused(tmp_path):
    questions = [TraceQuestion("1", "What?"), TraceQuestion("1", "Who?")]
    with pytest.raises(ValueError, match="two questions have the id '1'"):
        ask(tmp_path, Scripted("a", {"1": [said("x", "y")]}), questions)


def test_an_unreadable_picture_ends_with_a_verdict_and_costs_nothing(tmp_path):
    broken = TraceQuestion("1", "What?", sources=(EncodedPicture(b"no picture"),))
    teacher = Scripted("a", {"2": [said("it is red", "red")]})
    ask(tmp_path, teacher, [broken, TraceQuestion("2", "What?")])
    rows = {row["sample_id"]: row for row in rows_of(tmp_path)}
    assert teacher.asked == [("2", 0)]
    assert rows["1"]["rejected_by"] == ["teacher_error"]
    assert "is not a picture that can be read" in rows["1"]["error"]


# Verification again, and selection


def test_other_rules_judge_old_traces_again_without_a_teacher(tmp_path):
    question = TraceQuestion("1", "What?", ("100",), "number")
    teacher = Scripted("a", {"1": [said("it is 104", "104")]})
    ask(tmp_path, teacher, [question])
    assert rows_of(tmp_path)[0]["rejected_by"] == ["answer"]
    ask(tmp_path, teacher, [question], rules=Verification(language="", match="relaxed"))
    assert rows_of(tmp_path)[0]["verdict"] == "kept"
    ask(tmp_path, teacher, [question], rules=Verification(language="", min_words=9))
    assert rows_of(tmp_path)[0]["rejected_by"] == ["answer", "length"]
    assert len(teacher.asked) == 1


@pytest.mark.parametrize("scope", ["question", "all", "none"])
def test_near_duplicates(tmp_path, scope):
    long = "the red ball is left of the blue cup and above the green fish, so it is the one at the top of all of them"
    outputs = {
        "1": [said(long, "red"), said(long + " now", "red"), said("something else is said here", "red")],
        "2": [said(long, "red")] * 3,
    }
    questions = [TraceQuestion(id, "What?", ("red",)) for id in ("1", "2")]
    ask(tmp_path, Scripted("a", outputs), questions, samples=3, selection=Selection(duplicates=scope))
    found = {(row["sample_id"], row["repeat"]) for row in rows_of(tmp_path) if row["rejected_by"] == ["duplicate"]}
    expected = {"question": {("1", 1), ("2", 1), ("2", 2)}, "none": set()}
    expected["all"] = expected["question"] | {("2", 0)}
    assert found == expected[scope]


def test_the_best_sample_is_the_most_agreed_with_then_nearest_to_the_target(tmp_path):
    outputs = {"1": [said("one two three four five six", "red"), said("one two three", "red"), said("one", "blue")]}
    question = TraceQuestion("1", "What?")  # without gold, agreement decides
    for target, best in ((0, 1), (6, 0)):
        folder = tmp_path / str(target)
        selection = Selection(keep="best", target_length=target)
        ask(folder, Scripted("a", outputs), [question], samples=3, selection=selection)
        rows = {row["repeat"]: row for row in rows_of(folder)}
        assert [repeat for repeat, row in rows.items() if row["verdict"] == "kept"] == [best]
        assert [rows[repeat]["agreement"] for repeat in range(3)] == [0.5, 0.5, 0.0]
    ask(folder, Scripted("a", outputs), [question], samples=3, selection=Selection(min_agreement=0.5))
    assert {row["repeat"]: row["rejected_by"] for row in rows_of(folder)} == {0: [], 1: [], 2: ["agreement"]}


def test_agreement_between_teachers_is_recorded(tmp_path):
    questions = [TraceQuestion(str(number), "What?", ("1,200",)) for number in range(4)]
    ask(tmp_path, Scripted("one", {q.id: [said(f"so {q.id}", "1200")] for q in questions}), questions)
    answers = {"0": "1,200", "1": "1200.0", "2": "7", "3": "7"}
    ask(tmp_path, Scripted("two", {q.id: [said("then", answers[q.id])] for q in questions}), questions)
    assert store_yield(tmp_path).pairs == {("one", "two"): (4, 2)}
    assert {row["sample_id"]: row["agreement"] for row in rows_of(tmp_path)} == {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.0}


def test_selection_refuses_bad_settings():
    for wrong, message in (
        ({"keep": "some"}, "keep is 'some'"), ({"duplicates": "x"}, "duplicates is 'x'"), ({"similarity": 0}, "similarity is 0"),
        ({"min_agreement": 2}, "min_agreement is 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Selection(**wrong)


# Sources


@pytest.fixture
def pictures(tmp_path) -> Path:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / "inside" / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    return root


def questions_in(root: Path, *rows: dict, name: str = "q.jsonl", **policy) -> list[TraceQuestion]:
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(file_questions(root / name, ImagePolicy(root, **policy)))


def test_a_file_of_questions(pictures):
    first, second = questions_in(
        pictures,
        {"id": 7, "image": "inside/a.png", "question": " What? ", "answer": "red", "task": "chart"},
        {"images": [], "question": "Which?", "answers": ["B", "b"], "choices": ["x", "y"]},
    )
    assert (first.id, first.question, first.golds, first.kind, first.task) == ("7", "What?", ("red",), "open", "chart")
    assert first.pictures()[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert first.pictures()[0].path == "inside/a.png"
    assert (second.id, second.golds, second.kind, second.choices) == ("row-1", ("B", "b"), "choice", ("x", "y"))
    assert second.pictures() == []


def test_a_parquet_file_with_embedded_pictures(tmp_path, pictures):
    ask(tmp_path / "store", FiguresTeacher("terse"), figure_questions(2))
    table = read_traces(tmp_path / "store").select_columns(["sample_id", "images", "question", "golds"])
    table = table.rename_columns({"sample_id": "id", "golds": "answers"})
    table.to_parquet(pictures / "q.parquet")
    found = {question.id: question for question in file_questions(pictures / "q.parquet", ImagePolicy(pictures))}
    for question in figure_questions(2):
        assert found[question.id].golds == question.golds
        assert found[question.id].pictures()[0].image.tobytes() == question.drawn.image.tobytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../secret.png", "question": "?"}, "row 1: ../secret.png lies outside the image root"),
        ({"image": "inside/../../secret.png", "question": "?"}, "lies outside the image root"),
        ({"image": "/etc/passwd", "question": "?"}, "lies outside the image root"),
        ({"image": "link.png", "question": "?"}, "lies outside the image root"),
        ({"image": {"path": "../secret.png"}, "question": "?"}, "lies outside the image root"),
        (
            {"image": "https://example.com/a.png", "question": "?"},
            "is a remote picture: download it .* or pass --allow_remote",
        ),
        ({"image": "HTTP://example.com/a.png", "question": "?"}, "is a remote picture"),
        ({"image": "file:///etc/passwd", "question": "?"}, "not read from file: addresses"),
        ({"image": "data:image/png;base64,AAAA", "question": "?"}, "not read from data: addresses"),
        ({"image": 7, "question": "?"}, "its picture is int"),
        ({"image": "inside/a.png"}, "it has no question"),
        ({"question": "?", "kind": "odd"}, "its kind is 'odd'"),
        ({"question": "?", "task": "odd"}, "its task is 'odd'"),
    ],
)
def test_bad_rows_are_refused(pictures, row, message):
    with pytest.raises(ValueError, match=message):
        questions_in(pictures, row)


def test_allowed_remote_pictures_never_come_from_this_network(pictures):
    for address in (
        "http://127.0.0.1:1/a.png",
        "http://localhost/a.png",
        "http://169.254.169.254/latest",
        "http://[::1]/a.png",
    ):
        (question,) = questions_in(pictures, {"image": address, "question": "?"}, allow_remote=True)
        with pytest.raises(ValueError, match="points into a private network"):
            question.pictures()


def test_bad_files_are_refused(pictures):
    policy = ImagePolicy(pictures)
    (pictures / "bad.jsonl").write_text('{"question": "a"}\n{"question":\n')
    (pictures / "list.jsonl").write_text("[1]\n")
    for name, message in (
        ("missing.jsonl", "is not a file"), ("inside/a.png", "neither .jsonl nor .parquet"), ("bad.jsonl", "line 2 is not JSON"),
        ("list.jsonl", "line 1 is not a JSON object"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            list(file_questions(pictures / name, policy))


def test_pictures_by_reference(tmp_path, pictures):
    questions = questions_in(pictures, {"id": "1", "image": "inside/a.png", "question": "What?", "answer": "red"})
    ask(tmp_path / "store", Scripted("a", {"1": [said("a red square", "red")]}), questions, embed=False)
    (plain,) = read_traces(tmp_path / "store")
    assert (plain["images"], plain["image_paths"]) == ([], ["inside/a.png"])
    (row,) = read_traces(tmp_path / "store", image_root=pictures)
    assert row["images"][0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("encoding", "mime"),
    [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif"), ("TIFF", None)],
)
def test_pictures_are_sent_as_they_are_where_servers_know_the_format(encoding, mime):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, encoding)
    kind, data = data_url(EncodedPicture(buffer.getvalue())).split(";base64,")
    assert kind == f"data:{mime or 'image/png'}"
    assert (base64.b64decode(data) == buffer.getvalue()) == (mime is not None)
    assert EncodedPicture(base64.b64decode(data)).image.size == (8, 8)


# Page, card, command


def test_the_page_shows_both_sorts_and_nothing_from_outside(tmp_path):
    questions = list(figure_questions(12))
    ask(tmp_path, FiguresTeacher("structured", error_rate=0.5), questions, rules=Verification())
    ask(tmp_path, Scripted("<b>rude</b>", {q.id: ["<script>alert(1)</script>"] for q in questions}), questions)
    ask(tmp_path, FiguresTeacher("terse"), questions)
    page = write_page(tmp_path, shown=5).read_text()
    assert page.count("<article>") == 10
    assert page.count("data:image/png;base64,") == 10
    assert page.count("<svg") == 3
    assert "<script>" not in page and "<b>rude" not in page and "&lt;b&gt;rude" in page
    assert "http" not in page
    for word in ("precision", "Agreement between teachers", "parse", "the oracle put in"):
        assert word in page
    rejected = gallery(tmp_path, "rejected", 5)
    assert {row["teacher"] for row in rejected} == {"figures-structured", "<b>rude</b>"} | (
        {"figures-terse"} & {row["teacher"] for row in rejected}
    )
    assert all(row["verdict"] == "rejected" for row in rejected)


def test_the_folder_with_its_card_is_a_data_set(tmp_path, monkeypatch):
    ask(tmp_path, FiguresTeacher("terse"), figure_questions(5))
    write_page(tmp_path)
    text = write_card(tmp_path).read_text()
    assert "scripted oracle" in text and "figures/" not in text and "n<1K" in text
    assert load_dataset(str(tmp_path), split="train").features == FEATURES
    calls = []
    monkeypatch.setattr(card.HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(card.HfApi, "upload_folder", lambda self, **options: calls.append(options) or "address")
    assert push_to_hub(tmp_path, "me/traces") == "address"
    (name, created), uploaded = calls
    assert name == uploaded["repo_id"] == "me/traces"
    assert created["repo_type"] == uploaded["repo_type"] == "dataset" and created["private"]
    assert not any("journal" in pattern for pattern in uploaded["allow_patterns"])
    with pytest.raises(ValueError, match="holds no traces to push"):
        push_to_hub(tmp_path / "nothing", "me/traces")


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate_traces.py", *map(str, arguments)])
    runpy.run_path(str(REPO_ROOT / "generate_traces.py"), run_name="__main__")


def test_the_first_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--teacher", "figures", "--count", "20")
    shown = capsys.readouterr().out
    assert "figures-structured: 20 new traces, 0 were there, 0 without answer" in shown
    assert {path.name for path in (tmp_path / "outputs" / "traces").iterdir()} == {
        "data", "journal", "README.md", "report.html", "settings.json",
    }  # fmt: skip
    command(monkeypatch, "--count", "30", "--samples", "2", "--style", "terse", "--error_rate", "0")
    assert "figures-terse: 40 new traces, 20 were there" in capsys.readouterr().out
    assert len(read_traces("outputs/traces", kept=False)) == 100
    assert read_traces("outputs/traces", columns=["question"]).column_names == ["question"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "openai"], "--teacher openai needs --model"),
        (["--questions", "q.jsonl"], "the figures teacher knows drawn figures alone"),
        (["--count", "0"], "the drawn data has no end"),
        (["--count", "-1"], "--count is -1"),
        (["--images", "reference"], "use --images embed"),
        (["--sampling", "hot"], "--sampling is no JSON"),
        (["--sampling", "[1]"], "must be a JSON object"),
        (["--error_rate", "1.5"], "error_rate is 1.5"),
        (["--samples", "0"], "samples is 0"),
        (["--max_cost", "1"], "needs prices"),
        (["--language", "xx"], "language is 'xx'"),
        (["--teacher", "openai", "--model", "m", "--base_url", "ftp://x"], "base URL is 'ftp://x'"),
        (["--teacher", "transformers", "--model", "/nowhere"], "has no processor that can be loaded"),
    ],
)
def test_bad_settings_end_in_one_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert str(ended.value).startswith("error: ")
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not list(tmp_path.rglob("*.parquet"))
