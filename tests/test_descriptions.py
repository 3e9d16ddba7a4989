"""Descriptions of pictures for a student that reads in place of seeing: made by a teacher, resumed, counted, trained on."""

import io
import json
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chat_server import Server, sent_picture, serving
from PIL import Image

from siq_vl.data.conversations import text_of
from siq_vl.data.preprocessing import DropLog
from siq_vl.distill.descriptions import DESCRIPTIONS, Descriptions, pictures_to_describe
from siq_vl.distill.options import parse_options
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.training_rows import store_state, training_traces
from siq_vl.distill.verification import RuleInput, Verification
from siq_vl.distill.yields import store_yield

REPO_ROOT = Path(__file__).resolve().parent.parent
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0)}


class Describer(Server):
    """Answers sums, names the colour of a picture, and reads "STOP" on red ones; lime pictures it refuses to see."""

    async def respond(self, head, body, writer):
        asked = json.loads(body)
        prompt = asked["messages"][-1]["content"][-1]["text"]
        if "How much is" in prompt:
            return await super().respond(head, body, writer)
        self.seen.append(asked)
        with Image.open(io.BytesIO(sent_picture(asked))) as image:
            pixel = image.convert("RGB").getpixel((0, 0))
        (color,) = [name for name, value in COLORS.items() if value == pixel]
        text = f"Let me see.</think>\n\nA {color} square."
        if "text" in prompt:
            text = "STOP" if color == "red" else "No text."
        if color == "lime":
            text = "I'm sorry, but I cannot see the image."
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        self._send(writer, 200, {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 7}})
        return True


def generate(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["generate_traces.py", *map(str, arguments)])
    runpy.run_path(str(REPO_ROOT / "generate_traces.py"), run_name="__main__")


@pytest.fixture(params=["embed", "reference"])
def described(request, tmp_path, monkeypatch):
    """A store of traces whose pictures a teacher has described, the server that did, and the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for color in COLORS:
        Image.new("RGB", (8, 8), color).save(tmp_path / "pictures" / f"{color}.png")
    shown = {"1": "red", "2": "red", "3": "blue", "4": "lime", "5": None}
    rows = []
    for id, color in shown.items():
        row = {"id": id, "question": f"How much is {id} + 2?", "answer": int(id) + 2}
        rows.append({**row, "image": f"{color}.png"} if color else row)
    # A question whose trace is rejected: nobody pays for a description of its picture.
    rows.append({"id": "6", "question": "How much is 6 + 2?", "answer": 99, "image": "blue.png"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(Describer()) as (server, url):
        teacher = ["--teacher", "openai", "--model", "reader", "--base_url", url, "--output", "store"]
        pictures = ["--image_root", "pictures", "--images", request.param]
        generate(monkeypatch, *teacher, *pictures, "--questions", "q.jsonl")
        command = [*teacher, *pictures, "--describe", "caption", "ocr"]
        generate(monkeypatch, *command)
        yield tmp_path / "store", server, command, monkeypatch


def test_pictures_are_described_once_and_a_text_student_reads_it(described, capsys):
    store, server, command, monkeypatch = described
    assert len(server.seen) == 6  # three pictures, two tasks each
    rows = read_traces(store / DESCRIPTIONS, kept=False).to_list()
    assert {(row["sample_id"], row["task"], row["verdict"]): row["answer"] for row in rows} == {
        ("1", "caption", "kept"): "A red square.",
        ("1", "ocr", "kept"): "STOP",
        ("3", "caption", "kept"): "A blue square.",
        ("3", "ocr", "kept"): "No text.",
        ("4", "caption", "rejected"): "I'm sorry, but I cannot see the image.",
        ("4", "ocr", "rejected"): "I'm sorry, but I cannot see the image.",
    }
    assert {tuple(row["rejected_by"]) for row in rows} == {(), ("refusal",)}
    # The accounts are those of any store, and the traces' own stay as they are.
    found = store_yield(store / DESCRIPTIONS).teachers["reader"]
    assert (found.made, found.kept, found.read, found.written) == (6, 4, 30, 42)
    assert store_yield(store).teachers["reader"].made == 6
    assert "Descriptions of the pictures" in (store / "README.md").read_text()
    made = training_traces(
        TraceArguments(traces=str(store), student="text", image_root="pictures"), seed=0, max_bad_share=1
    )
    assert [text_of(row["messages"][0]) for row in made.rows] == [
        "A red square.\nText in the picture: STOP\nHow much is 1 + 2?",
        "A red square.\nText in the picture: STOP\nHow much is 2 + 2?",
        "A blue square.\nHow much is 3 + 2?",
        "How much is 5 + 2?",  # about no picture
    ]
    dropped = made.report.to_dict()["sources"][0]["dropped"]
    assert dropped == {"neither caption nor OCR text": 1, "rejected: answer": 1}
    # A second run does only what is missing; another teacher's words are added, and the first ones stay.
    generate(monkeypatch, *command)
    assert "reader: 0 new traces, 6 were there" in capsys.readouterr().out
    assert len(server.seen) == 6


def test_a_file_beside_the_store_goes_before_what_a_teacher_said(described):
    store, *_ = described
    (store / "captions.jsonl").write_text('{"sample_id": "2", "caption": "Two cats.", "ocr": null}\n')
    descriptions = Descriptions(store, DropLog(1.0))
    assert descriptions.of({"sample_id": "2", "question": "?"}) == "Two cats."
    assert descriptions.of({"sample_id": "1", "question": "?"}) == "A red square.\nText in the picture: STOP"


def test_another_description_is_another_run_of_a_text_student_alone(described):
    store, *_ = described
    text, seeing = (TraceArguments(traces=str(store), student=student) for student in ("text", "multimodal"))
    assert set(store_state(text)) - set(store_state(seeing)) == {f"{DESCRIPTIONS}/traces-00000.parquet"}


def test_what_is_missing_is_asked_within_a_budget(described, capsys):
    store, server, command, monkeypatch = described
    with TraceStore(store / DESCRIPTIONS) as opened:
        (shard,) = opened.shards()
        opened.rewrite(shard, pq.read_table(shard).slice(0, 2))
    generate(monkeypatch, *command, "--max_tokens", "1")
    assert "the budget is spent" in capsys.readouterr().out
    assert len(server.seen) == 6
    generate(monkeypatch, *command)
    assert len(server.seen) == 10
    assert len(read_traces(store / DESCRIPTIONS, kept=False)) == 6


@pytest.mark.parametrize(
    ("output", "said", "rules"),
    [
        ("A red bus.", "A red bus.", []),
        ("<think>Hm.</think><answer>A red bus.</answer>", "A red bus.", []),
        ("出口", "出口", []),
        ("<think>I began and", "", ["parse"]),
        ("", "", ["parse"]),
        ("A bus.<|im_end|>", "A bus.<|im_end|>", ["markup"]),
        ("bus " * 60, ("bus " * 60).strip(), ["repetition"]),
    ],
)
def test_a_description_is_judged_as_one(output, said, rules):
    trace = RuleInput("What does the picture show?", (), "open", (), output, "stop", False, "", task="caption")
    assert (trace.parsed.answer, Verification().judge(trace)) == (said, rules)


def test_what_cannot_be_described_is_refused(tmp_path):
    openai = ["--teacher", "openai", "--model", "m", "--describe", "caption"]
    with pytest.raises(ValueError, match="leave --questions out"):
        parse_options("", [*openai, "--questions", "q.jsonl"])
    with pytest.raises(ValueError, match="drawn figures have captions of their own"):
        parse_options("", ["--describe", "caption"])
    with TraceStore(tmp_path):
        pass
    with pytest.raises(ValueError, match="holds no kept trace whose picture has to be described"):
        list(pictures_to_describe(tmp_path, ["caption"]))
