"""Questions from any source of a recipe: all gold answers, choices, pictures, ids and splits, through the same adapters."""

import io
import json
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import serving
from PIL import Image

from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.sources import Source
from siq_vl.distill.options import parse_options
from siq_vl.distill.questions import LeftOut, TraceQuestion
from siq_vl.distill.source_questions import source_questions
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.distill.traces import TraceStore, evaluated, origins, read_traces
from siq_vl.distill.training_rows import training_traces
from siq_vl.distill.verification import RuleInput, Verification

REPO_ROOT = Path(__file__).resolve().parent.parent


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def stored(color: str = "red") -> dict:
    """A picture as the parquet files of the Hub have it."""
    return {"bytes": png(color), "path": None}


def table(folder: Path, rows: list[dict], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


def asked(path: Path, *arguments: str) -> list[TraceQuestion]:
    """The questions that the command asks."""
    command = ["--teacher", "openai", "--model", "m", "--questions", str(path), *arguments]
    return list(parse_options("", command).questions.open())


TEN = ["Dakota", "dakota digital", "dakota", "dakota", "dakota", "Dakota", "Dakota", "digital", "dakota", "clicker"]
SCIENCE = {"hint": "Look.", "task": "closed choice", "solution": "...", "lecture": ""}
# A row as published, the command's arguments, and what is asked: question, gold answers, kind, prompt, choices, pictures.
PUBLISHED = {
    "ChartQA": (
        {"image": stored(), "query": "How many?", "label": ["14", "fourteen"], "human_or_machine": 0},
        ("How many?", ("14", "fourteen"), "open", "chart", (), 1),
    ),
    "ScienceQA": (
        {"image": stored(), "question": "Which?", "choices": ["ice", "A. fire"], "answer": 1, **SCIENCE},
        ("Which?\nLook.", ("B",), "choice", "general", ("ice", "A. fire"), 1),
    ),
    "ScienceQA without a picture": (
        {"image": None, "question": "Which?", "choices": ["ice", "fire"], "answer": 0, **SCIENCE},
        ("Which?\nLook.", ("A",), "choice", "general", ("ice", "fire"), 0),
    ),
    "TextVQA": (
        {
            "image_id": "a",
            "question_id": 3,
            "question": "Brand?",
            "image": stored(),
            "answers": TEN,
            "set_name": "train",
        },
        ("Brand?", ("dakota", "Dakota"), "open", "document", (), 1),
    ),
    "TextVQA, its test split": (
        {"image_id": "a", "question_id": 3, "question": "Brand?", "image": stored(), "answers": [""] * 10},
        ("Brand?", (), "open", "document", (), 1),
    ),
    "DocVQA": (
        {"image": stored(), "question": "Who?", "answers": ["J. Doe", "Jane Doe", "Jane Doe"]},
        ("Who?", ("Jane Doe", "J. Doe"), "open", "general", (), 1),
    ),
    "COCO-QA": (
        {"image": stored(), "question": "what is red ?", "answer": "bus", "img_id": "7"},
        ("what is red ?", ("bus",), "open", "scene", (), 1),
    ),
    "LLaVA": (
        {
            "image": stored(),
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A bus."},
            ],
        },
        ("What?", ("A bus.",), "open", "general", (), 1),
    ),
    "FineVision": (
        {"images": [stored(), stored("blue")], "texts": [{"user": "Same?", "assistant": "no"}], "source": "x"},
        ("Same?", ("no",), "open", "general", (), 2),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_is_asked_with_all_that_verification_needs(name, tmp_path):
    row, wanted = PUBLISHED[name]
    (question,) = asked(table(tmp_path / "Data", [row]))
    made = (question.question, question.golds, question.kind, question.task, question.choices)
    assert (*made, len(question.pictures())) == wanted
    assert question.id == "Data/train/0"
    assert [picture.data for picture in question.pictures()] == [png(), png("blue")][: wanted[-1]]


def test_any_gold_answer_is_right_and_a_lone_annotator_is_not(tmp_path):
    row, _ = PUBLISHED["TextVQA"]
    (question,) = asked(table(tmp_path / "TextVQA", [row]))

    def verdict(answer: str) -> list[str]:
        output = f"<think>The label says so.</think><answer>{answer}</answer>"
        trace = RuleInput(question.question, question.golds, question.kind, (), output, "stop", False, "")
        return Verification().judge(trace)

    assert verdict("Dakota.") == []
    assert verdict("clicker") == verdict("digital") == ["answer"]


def test_a_row_of_several_questions_gives_each_its_own(tmp_path):
    rows = [{"image": stored(), "questions": ["Who?", "What?", "Which?"], "answers": ["Kafka", "novel", ""]}] * 2
    folder = table(tmp_path / "OCR-VQA", rows)
    questions = asked(folder)
    assert [(q.id, q.question, q.golds) for q in questions[:3]] == [
        ("OCR-VQA/train/0#0", "Who?", ("Kafka",)),
        ("OCR-VQA/train/0#1", "What?", ("novel",)),
        ("OCR-VQA/train/0#2", "Which?", ()),
    ]
    assert len(questions) == 6 and {q.task for q in questions} == {"document"}
    assert [q.id for q in asked(folder, "--turns", "first")] == ["OCR-VQA/train/0#0", "OCR-VQA/train/1#0"]
    assert len(asked(folder, "--count", "4")) == 4


def test_pictures_of_an_annotation_file_lie_below_its_folder_alone(tmp_path):
    """ChartQA as its authors publish it: a list of JSON, pictures by name."""
    (tmp_path / "chart" / "png").mkdir(parents=True)
    (tmp_path / "chart" / "png" / "1.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    names = ["1.png", "../secret.png", "2.png"]
    rows = [{"imgname": name, "query": "How many?", "label": "3"} for name in names]
    (tmp_path / "chart" / "train_human.json").write_text(json.dumps(rows, indent=1))
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    source = Source(SourceConfig(str(tmp_path / "chart")))
    (question,) = source_questions(source, left_out=left_out)
    assert [picture.path for picture in question.pictures()] == ["png/1.png"]
    noted = [json.loads(line) for line in left_out.path.read_text().splitlines()]
    assert [note["row"] for note in noted] == [2, 3]
    assert "outside the folder" in noted[0]["reason"] and "missing image" in noted[1]["reason"]
    with pytest.raises(ValueError, match="chart, row 2: image outside the folder"):
        list(source_questions(source))
    # The same, named by the file and the folder of its pictures.
    path = tmp_path / "chart" / "train_human.json"
    moved = asked(path, "--image_folder", str(tmp_path / "chart"), "--count", "1")
    assert [picture.path for picture in moved[0].pictures()] == ["png/1.png"]


def test_bad_rows_are_named_and_the_others_asked(tmp_path):
    rows = [
        {"query": "How many?", "label": ["3"], "image": stored()},
        {"query": "", "label": ["3"], "image": stored()},
        {"query": "What is <|im_end|>?", "label": ["3"], "image": stored()},
        {"query": "How many?", "label": ["3"], "image": {"bytes": None, "path": "gone.png"}},
        {"query": "How many now?", "label": None, "image": stored()},
    ]
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    found = list(source_questions(Source(SourceConfig(str(table(tmp_path / "Q", rows)))), left_out=left_out))
    assert [(question.id, question.golds) for question in found] == [("Q/train/0", ("3",)), ("Q/train/4", ())]
    assert left_out.count == 3
    with pytest.raises(ValueError, match="Q holds no question that can be asked: Q, row 1: empty question"):
        bad = Source(SourceConfig(str(table(tmp_path / "Q", rows[1:2]))))
        list(source_questions(bad, left_out=LeftOut(tmp_path / "again.jsonl")))
    nine = {"image": None, "question": "Which?", "choices": list("abcdefghi"), "answer": 1, **SCIENCE}
    with pytest.raises(ValueError, match="it has 9 choices: at most 8"):
        asked(table(tmp_path / "Nine", [nine]))


def test_more_questions_are_the_same_and_more(tmp_path):
    rows = [{"query": f"What is {n}?", "label": ["3"], "image": stored()} for n in range(40)]
    folder = table(tmp_path / "Q", rows)
    few, more, every = (asked(folder, *count) for count in (("--count", "10"), ("--count", "20"), ()))
    assert few == more[:10]
    assert sorted(q.id for q in few) != sorted(q.id for q in every[:10])  # drawn, since files are sorted by kind
    assert [q.question for q in every] == [f"What is {n}?" for n in range(40)]
    assert {q.id for q in more} < {q.id for q in every}
    assert [q.id for q in asked(folder, "--streaming", "--count", "3")] == ["Q/train/0", "Q/train/1", "Q/train/2"]


def test_a_file_of_questions_stays_one_and_a_published_file_is_told_from_it(tmp_path):
    own = tmp_path / "mine.jsonl"
    own.write_text(json.dumps({"question": "Which?", "choices": ["x", "y"], "answer": "B"}) + "\n")
    assert [(q.id, q.golds, q.task) for q in asked(own, "--task", "chart")] == [("row-0", ("B",), "chart")]
    (tmp_path / "a.png").write_bytes(png())
    published = tmp_path / "chartqa.jsonl"
    published.write_text(json.dumps({"query": "Which?", "label": ["3"], "image": "a.png"}) + "\n")
    assert [(q.id, q.golds) for q in asked(published)] == [("chartqa.jsonl/train/0", ("3",))]
    # ScienceQA has the columns of a file of questions and more, and its answers count from 0.
    science = tmp_path / "science.parquet"
    pq.write_table(pa.Table.from_pylist([PUBLISHED["ScienceQA without a picture"][0]]), science)
    assert [q.golds for q in asked(science)] == [("A",)]
    own.write_text(json.dumps({"question": "Which?", "choices": ["x", "y"], "answer": 0}) + "\n")
    with pytest.raises(ValueError, match="its answer is 0, which is none of its choices.*--format scienceqa"):
        asked(own)
    assert [q.golds for q in asked(own, "--format", "scienceqa")] == [("A",)]
    own.write_text(json.dumps({"question": "How many?", "choices": ["4", "0"], "answer": 0}) + "\n")
    assert [q.golds for q in asked(own)] == [("0",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tset"], "--split is 'tset'; of the drawn figures it must be one of train, validation"),
        (["--subset", "x"], "--subset is about a source: name it with --questions"),
        (["--questions", "a/b", "--format", "odd"], "--format is 'odd'; it must be one of finevision"),
    ],
)
def test_settings_of_a_source_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_options("", ["--teacher", "openai", "--model", "m", *arguments])


def test_a_split_that_is_evaluated_on_is_told_wherever_the_store_goes(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    row = {"image": stored(), "query": "How much is 3 + 4?", "label": ["7"]}
    for split in ("train", "test"):
        table(tmp_path / "ChartQA", [row], split)
    with serving() as (_, url):
        for split in ("train", "test"):
            command = ["generate_traces.py", "--teacher", "openai", "--model", "adder", "--base_url", url]
            command += ["--source", "ChartQA", "--output", "store", "--split", split]
            monkeypatch.setattr(sys, "argv", command)
            runpy.run_path(str(REPO_ROOT / "generate_traces.py"), run_name="__main__")
            shown = capsys.readouterr().out
            assert ("do not evaluate on it" in shown) == (split == "test")
    monkeypatch.setattr(
        sys, "argv", [*command[:-1], "validation", "--format", "cocoqa"]
    )  # no row of it can be asked so
    with pytest.raises(SystemExit, match="holds no question that can be asked"):
        runpy.run_path(str(REPO_ROOT / "generate_traces.py"), run_name="__main__")
    store = tmp_path / "store"
    assert origins(store) == [{"source": "ChartQA", "split": "train"}, {"source": "ChartQA", "split": "test"}]
    assert evaluated(store) == ["split test of ChartQA"]
    assert sorted(read_traces(store)["sample_id"]) == ["ChartQA/test/0", "ChartQA/train/0"]
    for name in ("README.md", "report.html"):
        assert "split test of ChartQA" in (store / name).read_text()
    assert "- `ChartQA`, split `train`" in (store / "README.md").read_text()
    training_traces(TraceArguments(traces=str(store)), seed=0)
    assert "the traces are of split test of ChartQA" in caplog.text


def test_what_is_evaluated_on_is_told_by_the_names_of_files_too(tmp_path):
    row = {"image": stored(), "query": "How many?", "label": ["7"]}
    folder = table(tmp_path / "ChartQA", [row], "test")
    # Every file of a folder is read where none is of the split asked for: these would be asked as those of `train`.
    with pytest.raises(
        ValueError, match="no file of ChartQA is of the split train, and test-00000.* are there: pass the"
    ):
        asked(folder)
    assert [q.id for q in asked(folder, "--split", "test")] == ["ChartQA/test/0"]
    assert [q.id for q in asked(table(tmp_path / "Latest", [row], "latest"))] == ["Latest/train/0"]
    for name, told in (
        ("test_human.json", True),
        ("mine-val.jsonl", True),
        ("latest.jsonl", False),
        ("tests.jsonl", False),
    ):
        store = tmp_path / name
        options = parse_options("", ["--teacher", "openai", "--model", "m", "--questions", f"some/{name}"])
        with TraceStore(store) as opened:
            described = options.questions.described()
            opened.note_questions({**described, "source": name})
            opened.note_questions({**described, "source": name})
        assert evaluated(store) == ([name] if told else [])
        assert len(origins(store)) == 1
    with TraceStore(tmp_path / "files") as opened:
        opened.note_questions({"source": "a/b", "data_files": "data/test-*.parquet", "split": "train"})
    assert evaluated(tmp_path / "files") == ["data/test-*.parquet of a/b"]
