"""Files of questions with bad rows: each is left out, named and counted, and every other row is asked."""

import json
import runpy
import struct
import sys
import zlib
from http.client import IncompleteRead, InvalidURL
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import serving
from PIL import Image

from siq_vl.distill import questions as questions_module
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import EncodedPicture, ImagePolicy, LeftOut, TraceQuestion, file_questions
from siq_vl.distill.teachers.base import Teacher, TeacherReply
from siq_vl.distill.traces import TraceStore
from siq_vl.distill.verification import Verification
from siq_vl.distill.yields import sealed_traces

REPO_ROOT = Path(__file__).resolve().parent.parent
GOOD = {"question": "What?", "answer": "red"}
NAN, DEEP = float("nan"), "[" * 100_000 + "]" * 100_000

# Rows that cannot be asked, and some words of the reason that is given.
BAD: dict[str, tuple[object, str]] = {
    "no question": ({"answer": "red"}, "it has no question"),
    "question is null": ({"question": None}, "it has no question"),
    "question is a number": ({"question": 7}, "it has no question"),
    "question is a list": ({"question": ["What?"]}, "it has no question"),
    "question is an object": ({"question": {"text": "What?"}}, "it has no question"),
    "question is blank": ({"question": " \n"}, "it has no question"),
    "half a character in the question": ({"question": "What\ud800?"}, "question holds half a character"),
    "half a character in the id": ({**GOOD, "id": "\udfff"}, "id holds half a character"),
    "half a character in the answer": ({**GOOD, "answer": "\ud800"}, "answer holds half a character"),
    "half a character in a choice": ({**GOOD, "choices": ["a", "\ud800"]}, "choice holds half a character"),
    "half a character in the picture": ({**GOOD, "image": "\ud800.png"}, "picture holds half a character"),
    "id is an object": ({**GOOD, "id": {"a": 1}}, "its id is dict"),
    "id is a list": ({**GOOD, "id": [1]}, "its id is list"),
    "id is NaN": ({**GOOD, "id": NAN}, "its id is nan"),
    "answer is an object": ({**GOOD, "answer": {"a": 1}}, "its answer is dict"),
    "answer is infinite": ({**GOOD, "answer": float("inf")}, "its answer is inf"),
    "answers within answers": ({**GOOD, "answers": [["red"]]}, "its answer is list"),
    "choices are a text": ({**GOOD, "choices": "red or blue"}, "its choices are 'red or blue': give a list"),
    "choices are a number": ({**GOOD, "choices": 7}, "its choices are 7: give a list"),
    "choices are an object": ({**GOOD, "choices": {"A": "red"}}, "its choices are 'dict': give a list"),
    "a choice is null": ({**GOOD, "choices": ["red", None]}, "its choice is NoneType"),
    "nine choices": ({**GOOD, "choices": list("abcdefghi")}, "it has 9 choices: at most 8"),
    "an unknown kind": ({**GOOD, "kind": "odd"}, "its kind is 'odd'"),
    "kind is an object": ({**GOOD, "kind": {"a": 1}}, "its kind is 'dict'"),
    "an endless kind": ({**GOOD, "kind": "x" * 10**6}, "its kind is 'xxx"),
    "task is a list": ({**GOOD, "task": ["chart"]}, "its task is 'list'"),
    "picture is a number": ({**GOOD, "image": 7}, "its picture is int"),
    "picture is true": ({**GOOD, "image": True}, "its picture is bool"),
    "picture is an empty object": ({**GOOD, "image": {}}, "its picture is NoneType"),
    "picture's bytes are a text": ({**GOOD, "image": {"bytes": "AAAA"}}, "its picture is dict"),
    "picture's bytes are numbers": ({**GOOD, "image": {"bytes": [1, 2]}}, "its picture is dict"),
    "picture's path is a number": ({**GOOD, "image": {"path": 5}}, "its picture is int"),
    "a null among the pictures": ({**GOOD, "images": ["a.png", None]}, "its picture is NoneType"),
    "too many pictures": ({**GOOD, "images": ["a.png"] * 65}, "it has 65 pictures: at most 64"),
    "outside the root": ({**GOOD, "image": "../a.png"}, "lies outside the image root"),
    "an absolute path": ({**GOOD, "image": "/etc/hostname"}, "lies outside the image root"),
    "NUL in the path": ({**GOOD, "image": "a\0.png"}, "holds a NUL character"),
    "a loop of links": ({**GOOD, "image": "loop.png"}, "cannot be followed to a file"),
    "a file address": ({**GOOD, "image": "file:///etc/hostname"}, "not read from file: addresses"),
    "a data address": ({**GOOD, "image": "data:image/png;base64,AAAA"}, "not read from data: addresses"),
    "an address with a space": ({**GOOD, "image": "http://host/a b.png"}, "holds white space"),
    "an address with a new line": ({**GOOD, "image": "http://host/a\r\nX: y"}, "holds white space"),
    "an address that is none": ({**GOOD, "image": "http://[::1/a.png"}, "Invalid IPv6"),
    "an id that another row has": ({**GOOD, "id": "first"}, "is that of a row before it"),
    "a list": ([1], "is not a JSON object"),
    "a number": (7, "is not a JSON object"),
    "null": (None, "is not a JSON object"),
    "half an object": (b'{"question": "What?"', "is not JSON"),
    "no JSON": (b"What? red", "is not JSON"),
    "nested deep": (DEEP.encode(), "is nested too deeply"),
    "nested deep in a field": (b'{"question": "What?", "id": ' + DEEP.encode() + b"}", "is nested too deeply"),
    "a number of many digits": (b'{"question": "What?", "id": ' + b"9" * 5000 + b"}", "is not JSON"),
    "another encoding": ('{"question": "Où?"}'.encode("latin-1"), "is not UTF-8 text"),
    "bytes": (bytes(range(11, 256)), "is not UTF-8 text"),
}

# Questions that can be asked, and whose pictures cannot be opened: the verdict says so, and no teacher is paid.
UNSEEN: dict[str, tuple[str, str]] = {
    "absent": ("absent.png", "is not a file below the image root"),
    "a folder": (".", "is not a file below the image root"),
    "a name of many letters": ("a" * 5000, "cannot be read"),
    "empty": ("empty.png", "is not a picture that can be read"),
    "a text": ("text.png", "is not a picture that can be read"),
    "half": ("half.png", "damaged"),
    "a bomb": ("bomb.png", "too many pixels"),
    "a program for a printer": ("page.eps", "is not a picture that can be read"),
}


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    Image.effect_noise((64, 64), 90).save(root / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    whole = (root / "a.png").read_bytes()
    (root / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("hello")
    (root / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (root / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (root / "loop.png").symlink_to("loop.png")
    return root


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims these sides, and has nothing in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(row: object) -> bytes:
    return (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["generate_traces.py", *map(str, arguments)])
    runpy.run_path(str(REPO_ROOT / "generate_traces.py"), run_name="__main__")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_left_out_with_its_number_and_the_reason(kind, root, tmp_path):
    row, reason = BAD[kind]
    first, last = {**GOOD, "id": "first"}, {**GOOD, "image": "a.png"}
    (root / "q.jsonl").write_bytes(encoded(first) + encoded(row) + encoded(last))
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    for _ in range(2):  # as for two teachers: the row is counted once
        policy = ImagePolicy(root, allow_remote=True)
        asked = list(file_questions(root / "q.jsonl", policy, left_out=left_out))
        assert [question.id for question in asked] == ["first", "row-2"]  # mending the row renames no other
    assert left_out.count == 1
    (noted,) = map(json.loads, (tmp_path / "left_out.jsonl").read_text().splitlines())
    assert (noted["source"], noted["row"]) == ("q.jsonl", 2)
    assert reason in noted["reason"]
    with pytest.raises(ValueError, match="q.jsonl, (row|line) 2"):  # nobody takes note
        list(file_questions(root / "q.jsonl", policy))


@pytest.mark.parametrize("name", ["id", "question", "answer", "kind", "task", "choices", "image", "answers", "images"])
def test_any_value_of_any_field_ends_nothing(name, root, tmp_path):
    values = [
        None, True, False, 0, -1, 2**64, 1e308, NAN, -NAN, "", " ", "\0", "\ud800", "x" * 10**5, [], {}, [[]], [{}], [None], [0], {"a": 1},
        {"bytes": None, "path": None}, {"bytes": "", "path": ""}, ["a", "b"], "a.png", "..", "~", "//a", "a:b", "http:", "http://", "://",
        "http://\u2603/", "data:", "javascript:alert(1)", "\\\\host\\a", "a.png\n", "<image>", "<|im_end|>", "{{ 7 * 7 }}", "{% raw %}",
    ]  # fmt: skip
    (root / "q.jsonl").write_bytes(b"".join(encoded({**GOOD, name: value}) for value in values) + encoded(GOOD))
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    asked = list(file_questions(root / "q.jsonl", ImagePolicy(root), left_out=left_out))
    assert len(asked) + left_out.count == len(values) + 1
    for question in asked:
        assert Prompts().render(question)


def test_the_command_asks_every_good_row_and_says_what_it_left_out(root, tmp_path, monkeypatch, capsys, caplog):
    rows_in = [encoded(row) for row, _ in BAD.values()]
    rows_in += [encoded({**GOOD, "id": name, "image": path}) for name, (path, _) in UNSEEN.items()]
    rows_in.insert(0, encoded({**GOOD, "id": "first", "image": "a.png"}))
    rows_in.append(encoded({"question": "How much is 2 + 3?", "answer": 5, "id": "last"}))
    (root / "q.jsonl").write_bytes(b"".join(rows_in))
    store = tmp_path / "store"
    with serving() as (server, url):
        arguments = ["--teacher", "openai", "--model", "adder", "--base_url", url, "--questions", root / "q.jsonl"]
        arguments += ["--output", store, "--allow_remote", "--language", ""]
        command(monkeypatch, *arguments)
        shown = capsys.readouterr().out
        assert f"{2 + len(UNSEEN)} new traces, 0 were there, {len(UNSEEN)} without answer" in shown
        assert f"{len(BAD)} rows of {root / 'q.jsonl'} cannot be asked and are left out" in shown
        assert server.counts["requests"] == 2
        # The rows are mended and nothing else is asked: neither for the rows that were good, nor for those without pictures.
        for place in range(1, 1 + len(BAD)):
            rows_in[place] = encoded(GOOD)
        (root / "q.jsonl").write_bytes(b"".join(rows_in))
        command(monkeypatch, *arguments)
        assert server.counts["requests"] == 2 + len(BAD)
    assert not (store / "left_out.jsonl").exists()
    assert caplog.text.count("is left out") == 5  # the file names them all
    found = {row["sample_id"]: row for row in sealed_traces(store, ["sample_id", "error", "verdict", "rejected_by"])}
    assert len(found) == 2 + len(UNSEEN) + len(BAD)
    assert found["last"]["verdict"] == "kept" and not found["first"]["error"]
    for place, (name, (_, reason)) in enumerate(UNSEEN.items(), 2 + len(BAD)):
        assert found[name]["rejected_by"] == ["teacher_error"]
        assert reason in found[name]["error"]
        assert f"picture of q.jsonl, row {place}: " in found[name]["error"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n{}\n", b"\xff\xfe\x00", b'{"text": "What?"}\n'])
def test_a_file_without_a_question_is_an_error(content, root, tmp_path):
    (root / "q.jsonl").write_bytes(content)
    for left_out in (LeftOut(tmp_path / "left_out.jsonl"), None):
        with pytest.raises(ValueError, match="q.jsonl"):
            list(file_questions(root / "q.jsonl", ImagePolicy(root), left_out=left_out))
    with pytest.raises(ValueError, match="holds no question that can be asked: "):
        list(file_questions(root / "q.jsonl", ImagePolicy(root), left_out=LeftOut(tmp_path / "left_out.jsonl")))


def test_lines_are_bounded_and_a_mark_of_byte_order_is_no_fault(root, tmp_path, monkeypatch):
    monkeypatch.setattr(questions_module, "_MAX_LINE", 99)
    long = encoded({**GOOD, "id": "x" * 500})
    (root / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + encoded(GOOD) + b"\r\n" + long + encoded(GOOD) + long[:-1])
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    asked = list(file_questions(root / "q.jsonl", ImagePolicy(root), left_out=left_out))
    assert [question.id for question in asked] == ["row-0", "row-2"]
    assert left_out.count == 2


def parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    return path


def test_a_bad_row_of_parquet_costs_no_other(root, tmp_path):
    questions = ["What?"] * 9
    questions[4] = " "
    offsets, data = (
        pa.array(range(0, 40, 4), pa.int32()).buffers()[1],
        pa.py_buffer(b"red " + b"\xff\xfe  " + b"red " * 7),
    )
    text = pa.StringArray.from_buffers(9, offsets, data)
    images = [{"bytes": (root / "a.png").read_bytes(), "path": None}] * 9
    images[7] = {"bytes": b"", "path": "../a.png"}
    stamps = pa.array([2**62] * 9, pa.timestamp("us"))  # a column that nobody asked for, and that Python cannot read
    table = pa.table({"question": questions, "answer": text, "images": [[image] for image in images], "seen": stamps})
    path = parquet(root / "q.parquet", table)
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    asked = list(file_questions(path, ImagePolicy(root), left_out=left_out))
    assert [question.id for question in asked] == [f"row-{number}" for number in (0, 2, 3, 5, 6, 8)]
    assert asked[0].pictures()[0].image.size == (64, 64)
    noted = [json.loads(line) for line in left_out.path.read_text().splitlines()]
    assert [note["row"] for note in noted] == [2, 5, 8]


def test_a_damaged_part_of_parquet_costs_no_other_part(root, tmp_path):
    path = parquet(root / "q.parquet", pa.table({"question": [f"What is {number}?" for number in range(9)]}))
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    damaged = bytearray(path.read_bytes())
    damaged[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    path.write_bytes(damaged)
    left_out = LeftOut(tmp_path / "left_out.jsonl")
    asked = list(file_questions(path, ImagePolicy(root), left_out=left_out))
    assert [question.id for question in asked] == [f"row-{number}" for number in (0, 1, 2, 6, 7, 8)]
    assert left_out.count == 3
    path.write_bytes(damaged[:-30])
    with pytest.raises(ValueError, match="q.parquet cannot be read as parquet"):
        list(file_questions(path, ImagePolicy(root), left_out=left_out))


@pytest.mark.parametrize("error", [InvalidURL("nonnumeric port"), IncompleteRead(b"abc"), ValueError("no")])
def test_a_picture_that_cannot_be_downloaded_is_a_verdict(error, root, monkeypatch):
    def fails(url: str) -> bytes:
        raise error

    monkeypatch.setattr(questions_module, "download_image", fails)
    (root / "q.jsonl").write_bytes(encoded({**GOOD, "image": "http://example.com/a.png"}))
    (question,) = file_questions(root / "q.jsonl", ImagePolicy(root, allow_remote=True))
    assert question.remote
    with pytest.raises(ValueError, match=r"cannot be downloaded|no"):
        question.pictures()


class Answers(Teacher):
    kind, name, in_flight = "transformers", "answers", 2

    def settings(self) -> dict:
        return {}

    async def generate(self, asked):
        return [
            TeacherReply("<think>It is red.</think><answer>red</answer>", prompt_tokens=1, completion_tokens=1)
            for _ in asked
        ]


def test_a_question_that_no_prompt_fits_is_a_verdict(tmp_path):
    """With hints, one question without a gold answer; with letters, one with more choices than there are."""
    questions = [
        TraceQuestion("1", "What?", ("red",)),
        TraceQuestion("2", "What?"),
        TraceQuestion("3", "What?", ("a",), choices=("a",) * 9),
    ]
    with TraceStore(tmp_path) as store:
        run = Run(Answers(), Prompts(hint=True), store, Verification(language=""), progress=False)
        assert run.over([*questions, TraceQuestion("4", "What?", ("red",), sources=(EncodedPicture(b""),))]).made == 4
    errors = {row["sample_id"]: row["error"] for row in sealed_traces(tmp_path, ["sample_id", "error"])}
    assert not errors["1"]
    assert errors["2"].startswith("prompt: question 2 has no gold answer")
    assert errors["3"].startswith("prompt: question 3 does not fit the template")
    assert errors["4"].startswith("picture: ")
