"""The store: a folder of parquet shards that `datasets` loads, one row a trace.

    traces/
        data/traces-00000.parquet   sealed shards, never half-written
        journal/00001.jsonl         finished traces that are in no shard yet, one line each, written at once
        journal/unreadable.txt      lines of a journal that were damaged, if there ever were any
        settings.json               how the traces are verified and selected, and where their questions are from
        README.md, report.html      the data card and the page

A finished trace is appended to the journal with a single write, so a killed process loses none. A full journal is sealed:
the shard of the same number is written beside and renamed into place, and only then the journal goes. Whoever opens the
store next seals what was left and no shard has. So a trace is in the store once or not at all.

A store always opens again. What cannot be stored is refused before it is written; what is damaged all the same (a journal
of an earlier version, a file that was copied by half) is mended where its trace can be read, and else set aside, never
deleted, and its trace is asked for again.
"""

import base64
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, List, Value, load_dataset

from siq_vl.distill.schema import FEATURES, TokensSpent, TraceRow
from siq_vl.files import write_text
from siq_vl.locks import Lock

logger = logging.getLogger(__name__)

_SCHEMA = FEATURES.arrow_schema
_ESSENTIAL = ("sample_id", "question", "teacher", "output")  # a journal's line without one of them is no trace
_UNREADABLE = "unreadable.txt"
_SETTINGS = "settings.json"
_FILES = (".json", ".jsonl", ".parquet")
_EVALUATED = re.compile(r"(?<![a-z])(?:test|testmini|val|minival|validation|dev)(?![a-z])")
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
        self._failure: BaseException | None = None  # of the thread that seals, until it is raised here
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

    def append(self, row: TraceRow) -> None:
        """Keep one finished trace; when this returns, killing the process does not lose it.

        Raises:
            ValueError: the columns are others, or hold what a shard could not: nothing is written.
        """
        if row.keys() != FEATURES.keys():
            raise ValueError(f"a trace has the columns {sorted(row)}; it needs {sorted(FEATURES)}")
        # Refused here and not when the journal is sealed, where it would take thousands of traces with it.
        values: dict[str, Any] = dict(row)
        for name, value in values.items():
            if not _fits(name, value):
                raise ValueError(
                    f"{name} is {str(value)[:80]!r}, which no shard can hold: it must be {_SCHEMA.field(name).type}"
                )
        packed = {**values, "images": [base64.b64encode(data).decode() for data in row["images"]]}
        line = json.dumps(packed).encode() + b"\n"
        # Unbuffered and in one call: once it returns, the line is the operating system's and outlives this process.
        with open(self._journal, "ab", buffering=0) as journal:
            try:
                written = journal.write(line)
                if written != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes of a trace could be written to {self._journal}")
            except OSError:
                journal.truncate(self._written_bytes)  # half a line would spoil the next one
                raise
        self._written += 1
        self._written_bytes += len(line)
        if self._written >= self._rows or self._written_bytes >= self._bytes:
            self._rotate()

    def trace_ids(self) -> set[int]:
        """Return the ids of the traces in the sealed shards, as numbers: a hundred thousand take some megabytes."""
        numbers: set[int] = set()
        for path in self.shards():
            numbers.update(_numbers(path))
        return numbers

    def spent(self, teacher: str) -> TokensSpent:
        """Return what a teacher has taken for the sealed traces."""
        spent = TokensSpent()
        for table in self.columns("teacher", "prompt_tokens", "completion_tokens", "error"):
            for row in table.to_pylist():
                if row["teacher"] == teacher:
                    spent.add(row["prompt_tokens"], row["completion_tokens"], text=not row["error"])
        return spent

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
            errors = pq.read_table(path, columns=["error"])["error"].to_pylist()
            answered = [not error for error in errors]
            if not all(answered):
                self._keep_only(path, answered)
                dropped += answered.count(False)
        return dropped

    def _keep_only(self, path: Path, wanted: Sequence[bool]) -> None:
        if any(wanted):
            self._write(path, pq.read_table(path).filter(pa.array(wanted)))
        else:
            path.unlink()  # `datasets` does not read a shard without rows

    def read_settings(self) -> dict:
        """Return how the traces are verified and selected; nothing, where that is not known."""
        settings = _settings_in(self.folder)
        if settings is None:
            logger.warning("%s cannot be read: every trace is verified again", _SETTINGS)
            return {}
        return settings

    def write_settings(self, settings: Mapping) -> None:
        """Note how the traces are verified and selected; where their questions are from stays noted."""
        noted = origins(self.folder)
        if noted:
            settings = {**settings, "questions": noted}
        write_text(self.folder / _SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def note_questions(self, described: Mapping[str, str]) -> None:
        """Note where questions are from: the source, and the split of it that must not be evaluated on."""
        noted = origins(self.folder)
        if described in noted:
            return
        settings = {**(_settings_in(self.folder) or {}), "questions": [*noted, dict(described)]}
        write_text(self.folder / _SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _recover(self) -> None:
        """Finish what a killed process began, and mend what is damaged."""
        # A shard that was being written when the process was killed: its journal is still there.
        for stray in (self.folder / "data").glob(".*.tmp"):
            stray.unlink()
        known: set[int] = set()
        for path in self.shards():
            self._mend_shard(path, known)
        for journal in sorted((self.folder / "journal").glob("*.jsonl")):
            self._mend_journal(journal, known)

    def _mend_shard(self, path: Path, known: set[int]) -> None:
        """Set a shard aside that cannot be read; drop traces that are known, and take note of the others."""
        try:
            names = pq.read_schema(path).names
            numbers = _numbers(path) if "trace_id" in names else []
        except (pa.ArrowException, OSError, ValueError) as error:
            aside = path.with_name(f"{path.name}.unreadable")
            os.replace(path, aside)
            logger.warning("%s cannot be read (%s): set aside, and its traces are asked for again", path.name, error)
            return
        for name in FEATURES:
            if name not in names:
                raise ValueError(f"{path} is no shard of traces, it has no column {name}: move it out of the store")
        fresh = _first_of_each(numbers, known)
        if not all(fresh):
            logger.warning("%s: %d traces were in the store already, once is kept", path.name, fresh.count(False))
            self._keep_only(path, fresh)

    def _mend_journal(self, journal: Path, known: set[int]) -> None:
        """Seal the traces that are left in a journal and not known, and take note of them."""
        rows = []
        for row in self._journal_rows(journal):
            number = int(row["trace_id"], 16)
            # The shard was in place and the journal not yet gone when the process was killed, or a file was copied in.
            if number not in known:
                rows.append(row)
                known.add(number)
        if rows:
            shard = self._shard(journal)
            # A journal that somebody named otherwise, or whose number a shard has, gets a number of its own.
            if shard is None or shard.exists():
                shard = self.folder / "data" / _SHARD.format(self._next_number())
            self._write(shard, to_table(rows))
        journal.unlink()

    def _shard(self, journal: Path) -> Path | None:
        """Return the shard that a journal is sealed into; None where its name is no number."""
        if not _is_number(journal.stem):
            return None
        return self.folder / "data" / _SHARD.format(int(journal.stem))

    def _next_number(self) -> int:
        """Return a number above that of every shard, set aside ones too, and of every journal."""
        names = [path.stem.rpartition("-")[2] for path in (self.folder / "data").glob("traces-*")]
        names += [path.stem for path in (self.folder / "journal").glob("*.jsonl")]
        highest = -1
        for name in names:
            if _is_number(name):
                highest = max(highest, int(name))
        return highest + 1

    def _open_journal(self) -> None:
        self._journal = self.folder / "journal" / _JOURNAL.format(self._next_number())
        self._journal.touch()
        self._written = self._written_bytes = 0

    def _rotate(self, *, last: bool = False, wait: bool = False) -> None:
        """Begin a new journal and seal the full one in a thread: the teachers are not kept waiting."""
        # One thread at a time, so that no more than one journal is in memory.
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
        rows = self._journal_rows(journal)
        if rows:
            self._write(self.folder / "data" / _SHARD.format(int(journal.stem)), to_table(rows))
        journal.unlink()

    def _journal_rows(self, journal: Path) -> list[dict]:
        """Return the traces of a journal; lines that hold none are kept in a file of their own."""
        rows: list[dict] = []
        unreadable: list[bytes] = []
        mended = 0
        with open(journal, "rb") as lines:
            for line in lines:
                try:
                    row, changed = _read_line(line)
                except (ValueError, RecursionError):
                    # The last line of a killed process has no end: the next one put there must not run into it.
                    unreadable.append(line.rstrip(b"\n") + b"\n")
                    continue
                rows.append(row)
                mended += changed
        if mended:
            logger.warning("%s: %d traces had fields that no shard can hold; they are mended", journal.name, mended)
        if unreadable:
            with open(journal.with_name(_UNREADABLE), "ab") as aside:
                aside.writelines(unreadable)
            logger.warning(
                "%s: %d lines hold no whole trace, which will be asked for again; they are kept in %s",
                journal.name, len(unreadable), _UNREADABLE,
            )  # fmt: skip
        return rows

    def _write(self, path: Path, table: pa.Table) -> None:
        temporary = path.parent / f".{path.name}.tmp"
        with open(temporary, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            # The journal goes once the shard is in place: it must be on the disk by then, not on its way there.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _numbers(path: Path) -> list[int]:
    """Return the ids in a shard, as numbers."""
    ids = pq.read_table(path, columns=["trace_id"], memory_map=False)["trace_id"].to_pylist()
    return [int(value, 16) for value in ids]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _first_of_each(numbers: Sequence[int], known: set[int]) -> list[bool]:
    """Return, for each number, whether it is not known yet; from here on it is."""
    fresh = []
    for number in numbers:
        fresh.append(number not in known)
        known.add(number)
    return fresh


def storable(text: str) -> str:
    """Return text that every file format takes: lone surrogates, which a model's bytes can decode to, replaced."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _fits(name: str, value: object) -> bool:
    """Return whether a shard's column can hold a value."""
    if value is None:
        return name == "agreement"
    if name == "trace_id":
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{1,16}", value) is not None
    if name == "images":
        return isinstance(value, list) and all(isinstance(data, bytes) for data in value)
    column_type = _SCHEMA.field(name).type
    # pyarrow turns some other things into texts and lists by itself; a journal would hold them as they are.
    if pa.types.is_list(column_type) and not _is_list_of_texts(value):
        return False
    if pa.types.is_string(column_type) and not isinstance(value, str):
        return False
    try:
        return pa.array([value], column_type).null_count == 0
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return False


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _mended(name: str, value: Any) -> Any:
    """Return the nearest that a column can hold: text without lone surrogates, else an empty value."""
    column_type = _SCHEMA.field(name).type
    if name == "agreement":
        return None
    if pa.types.is_list(column_type):
        if not isinstance(value, list):
            return []
        return [storable(text) for text in value if isinstance(text, str)]
    if pa.types.is_string(column_type):
        if not isinstance(value, str):
            return ""
        return storable(value)
    return column_type.to_pandas_dtype()(0)


def _read_line(line: bytes) -> tuple[dict, bool]:
    """Return the trace of a journal's line, and whether it had to be mended.

    A number or text that no shard can hold, as earlier versions took it from a server, becomes an empty one: the words
    of the teacher, which were paid for, stay.

    Raises:
        ValueError: there is no whole trace in the line.
    """
    row = json.loads(line)
    if not isinstance(row, dict) or not set(FEATURES) <= row.keys():
        raise ValueError("it does not have the columns of a trace")
    if not _is_list_of_texts(row["images"]):
        raise ValueError("its pictures are none")
    if not _fits("trace_id", row["trace_id"]) or not all(isinstance(row[name], str) for name in _ESSENTIAL):
        raise ValueError("it does not say whose trace of what it is")
    mended = False
    for name in FEATURES:
        if name != "images" and not _fits(name, row[name]):
            row[name] = _mended(name, row[name])
            mended = True
    # In the journal pictures are base64, in the shards what `datasets` makes of a picture.
    row["images"] = [{"bytes": base64.b64decode(data, validate=True), "path": None} for data in row["images"]]
    return row, mended


def to_table(rows: Sequence[Mapping]) -> pa.Table:
    """Return rows as a table with the columns and the metadata by which `datasets` knows pictures as pictures."""
    columns: dict[str, list] = {}
    for name in _SCHEMA.names:
        columns[name] = [row[name] for row in rows]
    return pa.Table.from_pydict(columns, schema=_SCHEMA)


def _settings_in(folder: Path) -> dict | None:
    """Return what a store's settings.json holds: nothing where there is none, None where it cannot be read."""
    path = folder / _SETTINGS
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(settings, dict):
        return None
    return settings


def origins(folder: Path) -> list[dict[str, str]]:
    """Return where the questions of a store are from: `source`, and `subset` and `split` where it has them.

    A store of an earlier version does not say.
    """
    noted = (_settings_in(folder) or {}).get("questions")
    if not isinstance(noted, list):
        return []
    return [each for each in noted if isinstance(each, dict) and isinstance(each.get("source"), str)]


def evaluated(folder: Path) -> list[str]:
    """Return the sources of a store whose questions are of a split that models are evaluated on, in words."""
    return [named for origin in origins(folder) if (named := evaluated_part(origin))]


def evaluated_part(origin: Mapping[str, str]) -> str:
    """Return, in words, the part of a data set that questions are of where models are evaluated on it; else nothing."""
    source, split, data_files = origin["source"], origin.get("split", "train"), origin.get("data_files", "")
    if not split.casefold().startswith("train"):
        return f"split {split} of {source}"
    if is_evaluated(data_files):
        return f"{data_files} of {source}"
    if source.endswith(_FILES) and is_evaluated(source):
        return source
    return ""


def is_evaluated(name: str) -> bool:
    """Return whether the name of a file tells that models are evaluated on what it holds."""
    return bool(_EVALUATED.search(name.casefold()))


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
    for journal in (Path(folder) / "journal").glob("*.jsonl"):
        if journal.stat().st_size:
            logger.warning("%s has traces that are in no shard yet: run generate_traces.py again to seal them", folder)
            break
    filters = None
    if kept:
        # Seen here, because `datasets` words an empty result as an error of its own.
        if not any(_has_kept(shard) for shard in shards):
            raise ValueError(
                f"{folder} holds no trace that was kept: see which rules reject them on its page, report.html"
            )
        filters = [("verdict", "==", "kept")]
    wanted = list(columns) if columns else None
    read = load_dataset("parquet", data_files=shards, split="train", filters=filters, columns=wanted)
    if image_root is None or "image_paths" not in read.column_names:
        return read
    files = []
    for paths in read["image_paths"]:
        files.append([str(Path(image_root) / path) for path in paths])
    if "images" in read.column_names:
        read = read.remove_columns("images")
    # First as texts, then cast: a column of pictures cannot be made of paths at once.
    return read.add_column("images", files, feature=List(Value("string"))).cast_column("images", List(Image()))


def _has_kept(shard: str) -> bool:
    return "kept" in pq.read_table(shard, columns=["verdict"])["verdict"].to_pylist()
