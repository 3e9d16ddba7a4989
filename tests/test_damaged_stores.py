"""Stores that are damaged: each opens again, says what it mended, and loses nothing that could be read."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import serving
from test_hostile_servers import GOOD, RULES, ask, nested, rows_of, teacher_at
from test_traces import blank

from siq_vl.distill.selection import Selection, update_verdicts
from siq_vl.distill.teachers.base import Teacher, TeacherReply
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.yields import store_yield


@pytest.fixture(scope="module")
def sane():
    """A server that answers as it should, and its address."""
    with serving() as (server, url):
        yield server, url


class Silly(Teacher):
    """A teacher of someone's own whose counts are no counts."""

    kind, name = "transformers", "silly"

    def settings(self) -> dict:
        return {}

    async def generate(self, asked):
        return [TeacherReply(GOOD + "\ud800", "\udfff", 2**63) for _ in asked]


def test_what_no_shard_can_hold_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match="prompt_tokens is '9223372036854775808', which no shard can hold"):
        ask(tmp_path, Silly())
    with TraceStore(tmp_path) as store:
        assert not store.trace_ids()
        for name, value in (
            ("attempts", 2**31), ("seconds", "1"), ("output", "\ud800"), ("golds", ["\ud800"]), ("error", None), ("hinted", "no"),
            ("trace_id", "klingon"), ("images", ["text"]), ("output", b"bytes"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{name} is .* which no shard can hold"):
                store.append(blank(1, **{name: value}))
        store.append(blank(2))
    assert len(rows_of(tmp_path)) == 1


def journal_of(folder: Path, lines: bytes, name: str = "00000.jsonl") -> None:
    (folder / "journal").mkdir(parents=True, exist_ok=True)
    (folder / "journal" / name).write_bytes(lines)


def line(number: int, **changes) -> bytes:
    return json.dumps(blank(number, **{"output": f"words {number}", **changes})).encode() + b"\n"


POISON = {
    "prompt_tokens": 2**63, "completion_tokens": -(2**63) - 1, "attempts": 2**31, "rationale_tokens": 10**30, "seconds": "long",
    "finish_reason": "\ud800", "rejected_by": ["\ud800"], "answer": "a\ud800", "error": None, "agreement": "none", "golds": None,
    "choices": [1, "a"], "repeat": 2**40, "hinted": "yes", "sampling": {"a": 1}, "verdict": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", POISON)
def test_a_poisoned_journal_heals_itself_and_keeps_the_words(name, tmp_path, caplog):
    journal_of(tmp_path, line(1) + line(2, **{name: POISON[name]}) + line(3))
    with TraceStore(tmp_path) as store:
        assert store.trace_ids() == {1, 2, 3}
        update_verdicts(store, RULES, Selection())
    assert "1 traces had fields that no shard can hold; they are mended" in caplog.text
    assert [row["output"] for row in rows_of(tmp_path)] == ["words 1", "words 2", "words 3"]
    assert store_yield(tmp_path).made == 3
    assert not (tmp_path / "journal" / "unreadable.txt").exists()


SCRAP = {
    "half a line": line(9)[:99] + b"\n", "garbage": os.urandom(300).replace(b"\n", b"") + b"\n", "NUL": b"\0" * 4096 + b"\n",
    "not an object": b"[1]\n", "not a trace": b'{"trace_id": "1"}\n', "nested deep": nested().encode() + b"\n",
    "no id": line(9, trace_id=None), "an odd id": line(9, trace_id="../x"), "no words": line(9, output=None),
    "no pictures": line(9, images=None), "half a picture": line(9, images=["AAA"]), "an empty line": b"\n",
    "a picture of another kind": line(9, images=[7]), "another encoding": b"\xff" + line(9).decode().encode("cp037") + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", SCRAP)
def test_a_line_that_holds_no_trace_is_set_aside_and_costs_no_other(kind, tmp_path, caplog):
    journal_of(tmp_path, line(1) + SCRAP[kind] + line(2) + line(3)[:-1])  # the last has all but its line's end
    with TraceStore(tmp_path) as store:
        assert store.trace_ids() == {1, 2, 3}
    assert "hold no whole trace, which will be asked for again" in caplog.text
    assert SCRAP[kind] in (tmp_path / "journal" / "unreadable.txt").read_bytes()
    with TraceStore(tmp_path) as store:
        assert store.trace_ids() == {1, 2, 3}


def test_a_trace_is_in_the_store_once_wherever_it_is_found(tmp_path, caplog):
    journal_of(tmp_path, line(1) + line(2) + line(1))
    journal_of(tmp_path, line(2) + line(3), "00007.jsonl")
    journal_of(tmp_path, line(4), "copy of 7.jsonl")
    with TraceStore(tmp_path) as store:
        assert store.trace_ids() == {1, 2, 3, 4}
    assert len(rows_of(tmp_path)) == 4
    # A shard with a journal of its number that has more; and a shard that was copied.
    journal_of(tmp_path, line(1) + line(5), "00000.jsonl")
    first = tmp_path / "data" / "traces-00000.parquet"
    (tmp_path / "data" / "traces-00000 (copy).parquet").write_bytes(first.read_bytes())
    with TraceStore(tmp_path) as store:
        store.append(blank(6))
    assert sorted(int(row["trace_id"], 16) for row in rows_of(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert "were in the store already, once is kept" in caplog.text


@pytest.mark.parametrize("kind", ["half", "empty", "garbage", "its journal is still there"])
def test_a_shard_that_cannot_be_read_is_set_aside_and_asked_for_again(kind, tmp_path, caplog, sane):
    ask(tmp_path, teacher_at(sane[1]))
    (shard,) = (tmp_path / "data").glob("*.parquet")
    whole = shard.read_bytes()
    if kind == "its journal is still there":
        row = {**read_traces(tmp_path, kept=False).to_list()[0], "images": []}
        journal_of(tmp_path, json.dumps(row).encode() + b"\n", "00000.jsonl")
    shard.write_bytes({"empty": b"", "garbage": b"PAR1" + bytes(99) + b"PAR1"}.get(kind, whole[: len(whole) // 2]))
    asked = ask(tmp_path, teacher_at(sane[1])).made
    assert asked == (1 if kind == "its journal is still there" else 2)
    assert "cannot be read" in caplog.text and "set aside" in caplog.text
    assert len(rows_of(tmp_path)) == 2
    assert len(list((tmp_path / "data").glob("*.unreadable"))) == 1


def test_a_parquet_file_of_something_else_is_named(tmp_path):
    with TraceStore(tmp_path):
        pass
    pq.write_table(pa.table({"a": [1]}), tmp_path / "data" / "traces-00000.parquet")
    with pytest.raises(ValueError, match="is no shard of traces, it has no column trace_id: move it out"):
        TraceStore(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", "[" * 100_000])
def test_settings_that_cannot_be_read_are_written_anew(text, tmp_path, sane, caplog):
    ask(tmp_path, teacher_at(sane[1]))
    (tmp_path / "settings.json").write_text(text)
    assert ask(tmp_path, teacher_at(sane[1])).made == 0
    assert "every trace is verified again" in caplog.text
    assert json.loads((tmp_path / "settings.json").read_text())["verification"] == RULES.settings()


def test_a_full_disk_spoils_no_other_trace(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:99])
            raise OSError("no space left on device")

    with TraceStore(tmp_path) as store:
        store.append(blank(1))
        with monkeypatch.context() as full:
            full.setattr("builtins.open", lambda path, mode, buffering: Full(path, mode))
            with pytest.raises(OSError, match="no space left"):
                store.append(blank(2))
        store.append(blank(3))
    assert [int(row["trace_id"], 16) for row in rows_of(tmp_path)] == [1, 3]
