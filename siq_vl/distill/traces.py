"""The store: a folder of parquet shards that `datasets` loads, one row a trace.

    traces/
        data/traces-00000.parquet   sealed shards, never half-written
        journal/00001.jsonl         finished traces that are in no shard yet, one line each, written at once
        settings.json               how the traces are verified and selected
        README.md, report.html      the data card and the page

A finished trace is appended to the journal with a single write, so a killed process loses none. A full journal is sealed:
the shard of the same number is written beside and renamed into place, and only then the journal goes. Whoever opens the
store next seals what was left; a journal whose shard exists is dropped. So a trace is in the store once or not at all.
"""

import base64
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value, load_dataset

from siq_vl.locks import Lock

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "trace_id": Value("string"),
        "sample_id": Value("string"),
        "images": List(Image()),
        "image_paths": List(Value("string")),
        "question": Value("string"),
        "golds": List(Value("string")),
        "choices": List(Value("string")),
        "kind": Value("string"),
        "task": Value("string"),
        "teacher": Value("string"),
        "teacher_kind": Value("string"),
        "revision": Value("string"),
        "prompt": Value("string"),
        "hinted": Value("bool"),
        "sampling": Value("string"),
        "repeat": Value("int32"),
        "output": Value("string"),
        "finish_reason": Value("string"),
        "error": Value("string"),
        "prompt_tokens": Value("int64"),
        "completion_tokens": Value("int64"),
        "seconds": Value("float64"),
        "attempts": Value("int32"),
        "injected": Value("string"),
        "rationale": Value("string"),
        "answer": Value("string"),
        "rationale_tokens": Value("int32"),
        "rejected_by": List(Value("string")),
        "agreement": Value("float64"),
        "verdict": Value("string"),
    }
)
VERDICTS = ("kept", "rejected")
# What verification and selection write; everything else is as the teacher left it.
JUDGED = ("rationale", "answer", "rationale_tokens", "rejected_by", "agreement", "verdict")
_SHARD, _JOURNAL = "traces-{:05d}.parquet", "{:05d}.jsonl"


def trace_id(sample_id: str, teacher: Mapping, repeat: int) -> str:
    """Return the id of a trace: the same sample asked of the same teacher in the same way, the same number of times."""
    text = json.dumps([sample_id, teacher, repeat], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TraceStore:
    """A store opened for writing; one process at a time.

    Args:
        folder: where it lies, made if need be.
        rows_per_shard: traces after which a journal is sealed.
        bytes_per_shard: bytes of journal after which it is sealed: what sealing holds in memory.

    Raises:
        ValueError: another process has it open, or its files are not those of a store.
    """

    def __init__(self, folder: Path, *, rows_per_shard: int = 4096, bytes_per_shard: int = 32 << 20):
        self.folder, self._rows, self._bytes = folder, rows_per_shard, bytes_per_shard
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "journal").mkdir(exist_ok=True)
        self._lock = Lock(folder)
        self._sealing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._recover()
        self._open_journal()

    def __enter__(self) -> "TraceStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Seal what is in the journal and let the store go."""
        try:
            self._rotate(last=True)
        finally:
            self._lock.release()

    def append(self, row: Mapping) -> None:
        """Keep one finished trace; when this returns, killing the process does not lose it.

        Args:
            row: the columns of `FEATURES`; `images` as a list of the pictures' bytes.
        """
        if row.keys() != FEATURES.keys():
            raise ValueError(f"a trace has the columns {sorted(row)}; it needs {sorted(FEATURES)}")
        packed = {**row, "images": [base64.b64encode(data).decode() for data in row["images"]]}
        line = json.dumps(packed).encode() + b"\n"
        with open(self._journal, "ab", buffering=0) as journal:
            written = journal.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes of a trace could be written to {self._journal}")
        self._written += 1
        self._written_bytes += len(line)
        if self._written >= self._rows or self._written_bytes >= self._bytes:
            self._rotate()

    def trace_ids(self) -> set[int]:
        """Return the ids of the traces in the sealed shards, as numbers: a hundred thousand take some megabytes."""
        return {
            int(value, 16)
            for path in self.shards()
            for value in pq.read_table(path, columns=["trace_id"], memory_map=False)["trace_id"].to_pylist()
        }

    def spent(self, teacher: str) -> tuple[int, int, int]:
        """Return the tokens that a teacher has read and written for the sealed traces, and in how many replies."""
        read = written = replies = 0
        for table in self.columns("teacher", "prompt_tokens", "completion_tokens"):
            for row in table.to_pylist():
                if row["teacher"] == teacher and row["prompt_tokens"] + row["completion_tokens"]:
                    read, written = read + row["prompt_tokens"], written + row["completion_tokens"]
                    replies += 1
        return read, written, replies

    def shards(self) -> list[Path]:
        """Return the sealed shards, in the order of their numbers."""
        return sorted((self.folder / "data").glob("traces-*.parquet"))

    def seal(self) -> None:
        """Move what is in the journal into a shard now."""
        self._rotate(wait=True)

    def columns(self, *names: str) -> Iterator[pa.Table]:
        """Yield some columns of every sealed shard, a shard at a time."""
        for path in self.shards():
            yield pq.read_table(path, columns=list(names))

    def rewrite(self, path: Path, table: pa.Table) -> None:
        """Put another table in the place of a shard, all or nothing."""
        self._write(path, table)

    def drop_failed(self) -> int:
        """Take out the traces for which no teacher had an answer, so that they are asked for again; return how many."""
        dropped = 0
        for path in self.shards():
            failed = pq.read_table(path, columns=["error"])["error"].to_pylist()
            if any(failed):
                table = pq.read_table(path)
                kept = table.filter(pa.array([not error for error in failed]))
                dropped += table.num_rows - kept.num_rows
                if kept.num_rows:
                    self._write(path, kept)
                else:
                    path.unlink()  # `datasets` does not read a shard without rows
        return dropped

    def read_settings(self) -> dict:
        path = self.folder / "settings.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_settings(self, settings: Mapping) -> None:
        write_text(self.folder / "settings.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _recover(self) -> None:
        """Finish what a killed process began."""
        for stray in (self.folder / "data").glob(".*.tmp"):
            stray.unlink()
        for journal in sorted((self.folder / "journal").glob("*.jsonl")):
            self._seal(journal)

    def _open_journal(self) -> None:
        taken = [int(path.stem.rpartition("-")[2]) for path in self.shards()]
        taken += [int(path.stem) for path in (self.folder / "journal").glob("*.jsonl")]
        self._journal = self.folder / "journal" / _JOURNAL.format(max(taken, default=-1) + 1)
        self._journal.touch()
        self._written = self._written_bytes = 0

    def _rotate(self, *, last: bool = False, wait: bool = False) -> None:
        """Begin a new journal and seal the full one in a thread: the teachers are not kept waiting."""
        self._wait()
        full = self._journal
        if not last:
            self._open_journal()
        self._sealing = threading.Thread(target=self._seal_in_thread, args=(full,))
        self._sealing.start()
        if last or wait:
            self._wait()

    def _seal_in_thread(self, journal: Path) -> None:
        try:
            self._seal(journal)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that writes
            self._failure = error

    def _wait(self) -> None:
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _seal(self, journal: Path) -> None:
        shard = self.folder / "data" / _SHARD.format(int(journal.stem))
        if not shard.exists():
            rows = list(_journal_rows(journal))
            if rows:
                self._write(shard, to_table(rows))
        journal.unlink()

    def _write(self, path: Path, table: pa.Table) -> None:
        temporary = path.parent / f".{path.name}.tmp"
        with open(temporary, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _journal_rows(journal: Path) -> Iterator[dict]:
    with open(journal, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):  # the write that a kill cut short: its trace counts as never asked
                logger.warning("%s ends in half a trace, which will be asked for again", journal.name)
                return
            row = json.loads(line)
            row["images"] = [{"bytes": base64.b64decode(data), "path": None} for data in row["images"]]
            yield row


def to_table(rows: Sequence[Mapping]) -> pa.Table:
    """Return rows as a table with the columns and the metadata by which `datasets` knows pictures as pictures."""
    schema = FEATURES.arrow_schema
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_traces(
    folder: str | Path, *, kept: bool = True, columns: Sequence[str] | None = None, image_root: str | Path | None = None
) -> Dataset:
    """Return the traces of a store as a data set: by default those that verification kept.

    Args:
        folder: the store.
        kept: only traces whose verdict is `"kept"`; with False the rejected ones too, with the rules that reject them.
        columns: only these columns of `FEATURES`.
        image_root: for a store that keeps pictures by reference, the folder that their paths start from.

    Raises:
        ValueError: there is no store, or it holds no such trace.
    """
    shards = sorted(str(path) for path in (Path(folder) / "data").glob("traces-*.parquet"))
    if not shards:
        raise ValueError(
            f"{folder} holds no traces: run `python generate_traces.py --teacher figures --count 300 --output {folder}` "
            "first, with the teacher and the count that you want"
        )
    waiting = [path for path in (Path(folder) / "journal").glob("*.jsonl") if path.stat().st_size]
    if waiting:
        logger.warning("%s has traces that are in no shard yet: run generate_traces.py again to seal them", folder)
    filters = [("verdict", "==", "kept")] if kept else None
    if kept and not any("kept" in pq.read_table(path, columns=["verdict"])["verdict"].to_pylist() for path in shards):
        raise ValueError(f"{folder} holds no trace that was kept: see which rules reject them on its page, report.html")
    read = load_dataset("parquet", data_files=shards, split="train", filters=filters, columns=columns and list(columns))
    if image_root is not None and "image_paths" in read.column_names:
        paths = [[str(Path(image_root) / path) for path in named] for named in read["image_paths"]]
        without = read.remove_columns([name for name in ("images",) if name in read.column_names])
        return without.add_column("images", paths, feature=List(Value("string"))).cast_column("images", List(Image()))
    return read
