"""Sources of training rows: a Hub data set or local files, whole or streamed, read as conversations."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE

from siq_vl.data.adapters import FORMATS, captions, recognise
from siq_vl.data.conversations import Conversation, well_formed
from siq_vl.data.fields import Unreadable, bad_row, kind, parse_row, plain_rows
from siq_vl.data.hub_errors import HUB_FAILURES, unreadable_data_set
from siq_vl.data.images import find_under
from siq_vl.data.mixture_config import SourceConfig

logger = logging.getLogger(__name__)

COCOQA_FILES = {"question": "questions.txt", "answer": "answers.txt", "img_id": "img_ids.txt"}
# The names that annotation files give to a split; OCR-VQA numbers them.
_SPLIT_NAMES = {"train": ("train", 1), "validation": ("validation", "val", 2), "val": ("val", "validation", 2)}
_SPLIT_NAMES["test"] = ("test", 3)
_TELLING_ROWS = 100  # rows of JSON that tell their format, which a single row might do wrongly
# Strings and brackets of JSON, which tell where a row ends even when it cannot be read.
_JSON_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_JSON_MARKS = re.compile(_JSON_STRING + r"|[\[\]{},]", re.DOTALL)
_JSON_NAME = re.compile(rf"\s*({_JSON_STRING})\s*:", re.DOTALL)
# What code that expects another row raises; the adapters of this project find their words themselves.
_UNEXPECTED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
_SHUFFLE_BUFFER = 500  # rows of a stream that wait, pictures encoded, to be drawn at random


class Source:
    """Rows of one source, each made a conversation when it is read.

    Args:
        config: what to read. Relative paths are looked for in the working folder, then in `places`.
        places: other folders for relative paths.

    Raises:
        ValueError: there is no such source, or its columns fit no known format.
    """

    def __init__(self, config: SourceConfig, places: Sequence[Path] = ()):
        self.config = config
        self.name, self.split, self.instruction = config.name, config.split, config.instruction
        self.path = next((path for path in _candidates(config.path, places) if path.exists()), None)
        # A Hub id has one slash at most; what looks like a path is not asked of the network.
        looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
        if self.path is None and looks_local:
            raise ValueError(f"there is no source {config.path}: pass a file, a folder, a Hub id or 'figures'")
        self.roots = self._roots(places)
        self.json = False  # whether rows are lines of JSON, which may differ in their types
        self.damaged: dict[str, str] = {}  # files that cannot be read, and why
        self.rows = self._open()
        self._marked: list[pyarrow.Table] | None = None  # the rows, with marks in place of pictures' bytes
        if not isinstance(self.rows, _Joined):
            self.rows = self.rows.with_format("arrow")  # pictures stay encoded
        for name, why in self.damaged.items():
            logger.warning("%s is left out of %s, since it cannot be read: %s", name, self.name, why)
        self.adapter = FORMATS[config.format or self._recognised()]
        if self.adapter is captions and config.instruction is None:
            raise ValueError("a source of captions asks no question: set `instruction` of this source in the recipe")

    def _roots(self, places: Sequence[Path]) -> list[Path]:
        """Return the folders that named pictures must lie in."""
        given = self.config.image_folder
        if given is not None:
            for folder in _candidates(given, places):
                if folder.is_dir():
                    return [folder]
            raise ValueError(f"image_folder {given} of {self.name} is not a folder: pass where its pictures lie")
        if self.path is None:  # a Hub data set names pictures in the caches of its library, where they were unpacked
            return [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
        folder = self.path
        if not folder.is_dir():
            folder = folder.parent
        if self.config.subset is None:
            return [folder]
        return [folder / self.config.subset, folder]

    def _open(self) -> "Dataset | IterableDataset | _Joined":
        config, path = self.config, self.path
        if path is None:
            try:
                return load_dataset(
                    config.path,
                    name=config.subset,
                    data_files=config.data_files,
                    split=config.split,
                    streaming=config.streaming,
                )
            except HUB_FAILURES as error:
                raise unreadable_data_set(config.path, config.subset, config.split, error) from error
        if path.is_dir() and config.subset is not None:
            path = path / config.subset
        if path.is_dir():
            if all((path / name).is_file() for name in COCOQA_FILES.values()):
                return self._listed(_read_cocoqa(path))
            # What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave.
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                return self._saved(path)
        files = _files(path, config.split)
        if files[0].suffix == ".parquet":
            return self._tables(files)
        if files[0].suffix == ".jsonl":
            # Read as text: rows of JSON may differ in their types, which a table of `datasets` does not allow.
            self.json = True
            names = [str(file) for file in files]
            return load_dataset(
                "text", data_files=names, encoding_errors="replace", split="train", streaming=config.streaming
            )
        return self._listed(self._annotated(files))

    def _saved(self, folder: Path) -> Dataset | IterableDataset:
        saved = load_from_disk(str(folder))
        if not isinstance(saved, Dataset):
            saved = saved[self.config.split]
        if self.config.streaming:
            return saved.to_iterable_dataset()
        return saved

    def _tables(self, files: Sequence[Path]) -> "Dataset | IterableDataset | _Joined":
        """Return the rows of parquet files: those of equal columns together, the most rows first."""
        groups: dict[str, list[str]] = {}
        sizes: Counter[str] = Counter()
        for file in files:
            try:
                about = pq.read_metadata(file)
            except (OSError, pyarrow.ArrowException) as error:
                self.damaged[file.name] = str(error)
                continue
            # Files may differ in what their writers noted beside the columns, and are of one kind all the same.
            columns = str(about.schema.to_arrow_schema().remove_metadata())
            sizes[columns] += about.num_rows
            if about.num_rows:
                groups.setdefault(columns, []).append(str(file))
        parts = []
        for columns in sorted(groups, key=sizes.__getitem__, reverse=True):
            parts += self._loaded(groups[columns])
        if not parts:
            why = "; ".join(f"{name}: {fault}" for name, fault in self.damaged.items()) or "they hold no rows"
            raise ValueError(f"no parquet file of {self.name} can be read: {why[:500]}")
        if len(parts) == 1:
            return parts[0]
        return _Joined([part.with_format("arrow") for part in parts])

    def _annotated(self, files: Sequence[Path]) -> list:
        """Return the rows of JSON files; a file that is none is left out, unless all are."""
        rows: list = []
        first_fault: ValueError | None = None
        for file in files:
            try:
                rows += read_annotations(file, self.split)
            except ValueError as error:
                self.damaged[file.name] = str(error)
                first_fault = first_fault or error
        if first_fault is not None and len(self.damaged) == len(files):
            raise first_fault
        return rows

    def _loaded(self, names: list[str]) -> list[Dataset | IterableDataset]:
        """Return parquet files as one data set or, where one of them is damaged inside, each of the others."""
        try:
            return [load_dataset("parquet", data_files=names, split="train", streaming=self.config.streaming)]
        except DatasetGenerationError as error:
            if len(names) == 1:
                # Found: this file alone is left out.
                self.damaged[Path(names[0]).name] = str(error.__cause__ or error)
                return []
        parts = []
        for name in names:
            parts += self._loaded([name])
        return parts

    def _listed(self, rows: list) -> Dataset | IterableDataset:
        """Return the rows of annotation files as lines of JSON, or what is wrong with one that cannot be read."""
        self.json = True
        texts, faults = [], []
        for row in rows:
            text, fault = _line(row)
            texts.append(text)
            faults.append(fault)
        listed = Dataset.from_dict({"text": texts, "fault": faults})
        if self.config.streaming:
            return listed.to_iterable_dataset()
        return listed

    def _recognised(self) -> str:
        """Return the format of most of the first rows; the rows of a table all have the same columns."""
        wanted = 1
        if self.json or isinstance(self.rows, _Joined):  # rows may differ
            wanted = _TELLING_ROWS
        readable = (row for row in self.stored() if isinstance(row, Mapping))
        found: Counter[str] = Counter()
        first_fault: ValueError | None = None
        for row in islice(readable, wanted):
            try:
                found[recognise(list(row))] += 1
            except ValueError as error:
                first_fault = first_fault or error
        if not found:
            why = first_fault or "it has no row that can be read"
            raise ValueError(f"source {self.name}: {why}") from first_fault
        return found.most_common(1)[0][0]

    def _row(self, table: pyarrow.Table | Unreadable) -> Mapping | Unreadable:
        """Return the row of a table of one."""
        if isinstance(table, Unreadable):
            return table
        (row,) = plain_rows(table)
        return self._parsed(row)

    def _parsed(self, row: Mapping) -> Mapping | Unreadable:
        """Return a stored row, read from its line of JSON where it is one."""
        if not self.json:
            return row
        if row.get("fault"):
            return Unreadable(row["fault"])
        return parse_row(row["text"])

    @property
    def streaming(self) -> bool:
        """Whether rows can only be read in order."""
        return self.config.streaming

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def declared(self) -> int | None:
        """Rows of the split: counted or, of a stream, as the data set's card says; None where it says nothing."""
        if not self.streaming:
            return len(self)
        info = getattr(self.rows, "info", None)
        splits = (info.splits or {}) if info is not None else {}
        return splits[self.split].num_examples if self.split in splits else None

    def conversation(self, row: Mapping | Unreadable) -> Conversation:
        """Return a row as a conversation, every part of which has the type that it must have.

        Raises:
            Dropped: the row does not have the form of the others.
        """
        if not isinstance(row, Mapping):  # `Unreadable` says itself what it is
            raise bad_row(f"it is {kind(row)}")
        try:
            return well_formed(self.adapter(row, self))
        except _UNEXPECTED as error:
            name, fault = self.adapter.__name__, str(error)
            if isinstance(error, KeyError):
                fault = f"no field {error}"
            raise bad_row(f"the adapter {name} makes no conversation of it ({fault})") from error

    def __getitem__(self, index: int) -> Mapping | Unreadable:
        """Return a row as it is stored, its pictures not decoded."""
        return self._row(self.rows[index])

    def __getstate__(self) -> dict:
        # Made anew where it is needed: `datasets` hashes what rows are read with, and would read every text.
        return {**vars(self), "_marked": None}

    def _parts(self) -> Sequence[Any]:
        """Return the data sets that the rows lie in, one after the other."""
        if isinstance(self.rows, _Joined):
            return self.rows.parts
        return [self.rows]

    @property
    def fingerprint(self) -> str:
        """What tells the stored rows from others, as `datasets` knows it: by their content, or by their files."""
        return "/".join(part._fingerprint for part in self._parts())

    def without_pictures(self, numbers: Sequence[int]) -> list[Mapping | Unreadable]:
        """Return rows as they are stored, but with a mark in place of a picture's bytes, which are not read."""
        parts = self._parts()
        if any(part._indices is not None for part in parts):  # their rows lie elsewhere in their table
            return [self[number] for number in numbers]
        if self._marked is None:
            self._marked = [
                pyarrow.table({name: _marked(part.data.column(name)) for name in part.column_names}) for part in parts
            ]
        by_number: dict[int, Mapping | Unreadable] = {}
        first = 0
        for table in self._marked:
            own = [number for number in numbers if first <= number < first + table.num_rows]
            taken = table.take(pyarrow.array([number - first for number in own], pyarrow.int64()))
            by_number |= zip(own, map(self._parsed, plain_rows(taken)), strict=True)
            first += table.num_rows
        return [by_number[number] for number in numbers]

    def stored(self) -> Iterator[Mapping | Unreadable]:
        """Yield every row as it is stored, in its order."""
        yield from map(self._row, self._every())

    def stream(self, part: int, parts: int, seed: int) -> Iterator[tuple[int, Mapping | Unreadable]]:
        """Yield (number, row), shuffled, of one of the `parts` that the rows are dealt out in.

        Files are dealt out where there are enough of them, single rows otherwise. A row has the same number each time.
        """
        if not self.streaming:
            order = list(range(part, len(self.rows), parts))
            Random(seed).shuffle(order)
            for index in order:
                yield index, self[index]
            return
        tables = self._single_rows(part, parts)
        if self.rows.n_shards >= parts:
            tables = self._whole_files(part, parts, seed)
        for number, table in _shuffled(tables, seed):
            yield number, self._row(table)

    def _single_rows(self, part: int, parts: int) -> Iterator[tuple[int, pyarrow.Table | Unreadable]]:
        """Yield (number, row) of the rows of a stream that fall to one part."""
        for number, table in enumerate(self._every()):
            if number % parts == part:
                yield number, table

    def _whole_files(self, part: int, parts: int, seed: int) -> Iterator[tuple[int, pyarrow.Table | Unreadable]]:
        """Yield (number, row) of the files of a stream that fall to one part, in an order of their own."""
        n_shards = self.rows.n_shards
        shards = list(range(part, n_shards, parts))
        Random(seed).shuffle(shards)
        for shard in shards:
            for index, table in enumerate(self._shard(shard)):
                # Other files' rows have the numbers between: nobody knows how many rows a file has.
                yield index * n_shards + shard, table

    def _every(self) -> Iterator[pyarrow.Table | Unreadable]:
        """Yield every row in its order."""
        if not self.streaming:
            yield from self.rows.iter(1)
            return
        # Shard by shard, since plain iteration deals rows out among loader processes once more.
        for shard in range(self.rows.n_shards):
            yield from self._shard(shard)

    def _shard(self, shard: int) -> Iterator[pyarrow.Table | Unreadable]:
        """Yield the rows of one of a stream's files; where a local file breaks off, an unreadable row ends it."""
        tables = self.rows.shard(self.rows.n_shards, shard).iter(1)
        while True:
            try:
                table = next(tables, None)
            except HUB_FAILURES as error:
                config = self.config
                if self.path is None:  # a network that fails is no fault of a row
                    raise unreadable_data_set(config.path, config.subset, config.split, error) from error
                if not isinstance(error, (OSError, pyarrow.ArrowException)):
                    raise
                yield Unreadable(f"the end of a damaged file ({error})")
                return
            if table is None:
                return
            yield table

    def find(self, names: Sequence[str]) -> str:
        """Return the first name that is a picture of this source, or the first of all where none is."""
        # Data sets are unpacked in more than one way; the name that is there tells which.
        for name in names:
            try:
                find_under(name, self.roots)
            except (FileNotFoundError, PermissionError):
                continue
            return name
        return names[0]


def _marked(column: Any) -> Any:
    """Return a column with a mark in place of all bytes in it, which are not read; empty ones and null stay.

    Args:
        column: of a table, or a part of one: a `ChunkedArray` or an `Array`, of any type.
    """
    if isinstance(column, pyarrow.ChunkedArray):
        chunks = [_marked(chunk) for chunk in column.chunks]
        return pyarrow.chunked_array(chunks, type=chunks[0].type if chunks else column.type)
    kind_of = column.type
    if pyarrow.types.is_binary(kind_of) or pyarrow.types.is_large_binary(kind_of):
        # Lengths are known from the offsets alone.
        return pc.if_else(pc.equal(pc.binary_length(column), 0), b"", b"\0")
    if pyarrow.types.is_struct(kind_of):
        parts = [_marked(column.field(index)) for index in range(kind_of.num_fields)]
        fields = [kind_of.field(index).with_type(part.type) for index, part in enumerate(parts)]
        return pyarrow.StructArray.from_arrays(parts, fields=fields, mask=column.is_null())
    if pyarrow.types.is_list(kind_of) or pyarrow.types.is_large_list(kind_of):
        values = _marked(column.values)  # of the whole column: a slice has its own offsets into it
        outer = pyarrow.list_ if pyarrow.types.is_list(kind_of) else pyarrow.large_list
        own = column.buffers()[:2]  # which lists are null, and where each begins
        return pyarrow.Array.from_buffers(outer(values.type), len(column), own, offset=column.offset, children=[values])
    return column


def _candidates(path: str, places: Sequence[Path]) -> list[Path]:
    """Return where a path may lie: in the working folder, then in each of the places."""
    return [Path(path), *(place / path for place in places)]


class _Joined:
    """Files whose columns differ, one after the other: what a source asks of a data set."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts

    @property
    def n_shards(self) -> int:
        return sum(part.n_shards for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> pyarrow.Table:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("there is no such row")

    def iter(self, batch_size: int) -> Iterator[pyarrow.Table]:
        for part in self.parts:
            yield from part.iter(batch_size)

    def shard(self, num_shards: int, index: int) -> Any:
        """Return one of all files; `num_shards` is how many they are."""
        for part in self.parts:
            if index < part.n_shards:
                return part.shard(part.n_shards, index)
            index -= part.n_shards
        raise IndexError(f"there is no file {index} of {num_shards}")


def _shuffled(items: Iterator, seed: int) -> Iterator:
    """Yield items in an order that is random within a buffer."""
    rng = Random(seed)
    buffer: list = []
    for item in items:
        # Until the buffer is full nothing comes out; then each item takes the place of a random one.
        if len(buffer) < _SHUFFLE_BUFFER:
            buffer.append(item)
            continue
        place = rng.randrange(_SHUFFLE_BUFFER)
        buffer[place], item = item, buffer[place]
        yield item
    rng.shuffle(buffer)
    yield from buffer


def read_annotations(path: Path, split: str) -> list[Any]:
    """Return the rows of an annotation file: a list, a list under `data`, or objects by their id.

    Rows that name their `split` are kept where it is the one asked for. One that cannot be read is `Unreadable`.

    Raises:
        ValueError: the file is not JSON, or has another form.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        content = None
        # A text that goes on behind its end is JSON lines or something else; reading its rows would lose the rest.
        if not str(error).startswith("Extra data"):
            content = _row_by_row(text)
        if content is None:
            raise ValueError(f"{path.name} is not a JSON file: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and 2 * sum(isinstance(row, dict) for row in content.values()) > len(content):
        content = [_with_id(name, row) for name, row in content.items()]
    if not isinstance(content, list):
        raise ValueError(
            f"{path.name} holds neither a list of rows, nor a list under 'data', nor objects by id: convert it to JSONL"
        )
    names = _SPLIT_NAMES.get(split, (split,))
    rows = []
    for row in content:
        # A row that names no split, or is none at all, is of whatever split is asked for.
        if not isinstance(row, dict) or row.get("split", names[0]) in names:
            rows.append(row)
    return rows


def _with_id(name: str, row: Any) -> Any:
    """Return an entry of an object as a row that knows its id."""
    if not isinstance(row, dict):
        return row
    return {"id": name, **row}


def _row_by_row(text: str) -> list | None:
    """Return the rows of a JSON text that cannot be read as a whole, each read on its own; None where none can be."""
    text = text.strip()
    rows: list = []
    if text.startswith("["):
        rows = [parse_row(piece) for piece in _pieces(text)]
    elif text.startswith("{"):
        for piece in _pieces(text):
            name = _JSON_NAME.match(piece)
            if name is None:
                rows.append(parse_row(piece))
                continue
            value = piece[name.end() :]
            if name.group(1) == '"data"' and value.lstrip().startswith("["):
                return _row_by_row(value)
            rows.append(_with_id(name.group(1).strip('"'), parse_row(value)))
    if any(isinstance(row, dict) for row in rows):
        return rows
    return None


def _pieces(text: str) -> Iterator[str]:
    """Yield the text of each entry of a list or object, without reading any."""
    depth, start = 0, 1
    for mark in _JSON_MARKS.finditer(text):
        if mark.group() in ("[", "{"):
            depth += 1
        elif mark.group() in ("]", "}"):
            depth -= 1
        # An entry ends at a comma of the outermost level, the last at its closing bracket.
        if depth == 0 or (depth == 1 and mark.group() == ","):
            piece = text[start : mark.start()]
            if piece.strip():
                yield piece
            start = mark.end()
        if depth == 0:
            return
    yield text[start:]  # the text breaks off


def _line(row: Any) -> tuple[str, str]:
    """Return a row of a JSON file as a line of JSON, and, of one that cannot be read, what is wrong with it."""
    if isinstance(row, Unreadable):
        return "", row.why
    # Written out again, so that rows of any types can lie in one column of text.
    try:
        return json.dumps(row), ""
    except RecursionError:
        return "", "JSON that is nested too deeply"


def _read_cocoqa(folder: Path) -> list[dict[str, str]]:
    columns: dict[str, list[str]] = {}
    for name, file in COCOQA_FILES.items():
        text = (folder / file).read_text("utf-8", errors="replace")
        # A line ends at its line break alone, and not, as for `splitlines`, at other characters within it.
        columns[name] = text.removesuffix("\n").split("\n")
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{COCOQA_FILES[name]} {len(values)}" for name, values in columns.items())
        raise ValueError(f"the files of COCO-QA must have one line a question each, but have: {lengths}")
    rows = []
    for values in zip(*columns.values(), strict=True):
        rows.append(dict(zip(columns, values, strict=True)))
    return rows


def _files(path: Path, split: str) -> list[Path]:
    """Return the files of rows at a path, all of one kind, those of the split where their names tell it."""
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl", ".json"):
            raise ValueError(f"{path.name} is no source of rows: pass a .parquet, .jsonl or .json file, or a folder")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path.name} is neither a file nor a folder: check `path` and `subset` of the source")
    for pattern in ("*.parquet", "*.jsonl", "*.json"):
        # `dataset_info` and `pid_` begin the names of files that lie beside rows, and are none.
        found = sorted(file for file in path.rglob(pattern) if not file.name.startswith((".", "dataset_info", "pid_")))
        if found:
            return _of_split(found, path, split)
    raise ValueError(f"the folder {path.name} holds no .parquet, .jsonl or .json file: check `path` of the source")


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Return the files whose path below a folder names the split, or all where none does."""
    names = [str(name) for name in _SPLIT_NAMES.get(split, (split,))[:-1]] or [split]  # the last is OCR-VQA's number
    named = []
    for file in files:
        below = str(file.relative_to(folder))
        if any(name in below for name in names):
            named.append(file)
    return named or files
