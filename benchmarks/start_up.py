"""
What a run costs before its first step: looking a mixture's rows through, and the first row of a stream.

    python benchmarks/start_up.py --clock cpu --rows 20000

Short rows with one picture each, in parquet files with the pictures inside, and in a JSON file that names them. The
baseline is the method of before: each row is rendered whole, once for every turn and once more, and tokenized alone. It is
measured on a part of the rows, and figures are microseconds a row.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from random import Random

import common
import datasets
import numpy as np
from datasets import Dataset
from PIL import Image

from siq_vl.data.conversations import check
from siq_vl.data.filters import filtered
from siq_vl.data.mixture_config import MixtureConfig, SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.data.preprocessing import locate
from siq_vl.data.sources import Source

MAX_LENGTH = 1024
WORDS = ("red", "circle", "left", "of", "the", "blue", "square", "what", "is", "shown", "how", "many", "where", "lie")


def write(folder: Path, rows: int) -> dict[str, Path]:
    """Write the same short rows twice; return the paths by what they are called."""
    rng, noise = Random(0), np.random.default_rng(0)
    (folder / "named" / "images").mkdir(parents=True)
    pictures = []
    for index in range(64):
        path = folder / "named" / "images" / f"{index}.jpg"
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        pictures.append({"bytes": path.read_bytes(), "path": None})
    inside, named = [], []
    for index in range(rows):
        question, answer = " ".join(rng.choices(WORDS, k=10)), " ".join(rng.choices(WORDS, k=2))
        inside.append({"images": [pictures[index % 64]], "texts": [{"user": question, "assistant": answer}]})
        said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        named.append({"image": f"images/{index % 64}.jpg", "conversations": said})
    (folder / "inside").mkdir()
    Dataset.from_list(inside).to_parquet(folder / "inside" / "rows.parquet")
    (folder / "named" / "rows.json").write_text(json.dumps(named))
    return {"pictures inside": folder / "inside", "pictures named": folder / "named"}


def as_before(path: Path, processor, options: argparse.Namespace) -> common.Figures:
    """Look some rows through one by one, each rendered once more than for every turn, twice."""
    source = Source(SourceConfig(str(path)))
    order = list(range(len(source)))
    Random(0).shuffle(order)
    seconds = common.stopwatch(options)
    for number in order[: options.rows_before]:
        conversation = filtered(source.conversation(source[number]), source.config.filters)
        check(conversation)
        for image in conversation.images:
            locate(image, source)
        messages = list(conversation.messages)
        texts = [processor.apply_chat_template(messages, tokenize=False)]
        for turn in range(1, len(messages), 2):
            texts.append(processor.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True))
            texts.append(processor.apply_chat_template(messages[: turn + 1], tokenize=False))
        processor.tokenizer(texts[:2], add_special_tokens=False)
        len(processor.beginning_ids)
    return {"looking through": 1e6 * seconds() / options.rows_before}


def first_start(path: Path, processor, options: argparse.Namespace) -> common.Figures:
    """Look all rows through that nobody has looked at, the data set opened."""
    with tempfile.TemporaryDirectory() as folder:
        before = datasets.config.HF_DATASETS_CACHE
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            return next_start(path, processor, options)
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def next_start(path: Path, processor, options: argparse.Namespace) -> common.Figures:
    """Open a data set and look its rows through, or read what came of it another time."""
    config = MixtureConfig(sources=[SourceConfig(str(path))])
    seconds = common.stopwatch(options)
    mixture = build_mixture(
        config, "answer", None, processor=processor, max_length=MAX_LENGTH, processes=options.processes
    )
    figures = {"looking through": 1e6 * seconds() / options.rows}
    if len(mixture.rows) != options.rows:
        raise ValueError(f"{len(mixture.rows)} of {options.rows} rows passed: all should")
    return figures


def first_row(path: Path, processor, options: argparse.Namespace) -> common.Figures:
    """Open a data set as a stream and read its first row."""
    config = MixtureConfig(sources=[SourceConfig(str(path), streaming=True)])
    seconds = common.stopwatch(options)
    next(iter(build_mixture(config, "answer", None, processor=processor, max_length=MAX_LENGTH).rows))
    return {"first row of a stream": seconds()}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rows_before", type=int, default=1000, help="that the method of before is measured on")
    parser.add_argument("--processes", type=int, default=1, help="that look through, with the wall clock")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.rows, options.rows_before = 40, 20
    _, processor = common.random_config(options.shape)
    looking, streams = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for name, path in write(Path(folder), options.rows).items():
            looking[name] = common.interleaved(
                {
                    "as before": partial(as_before, path, processor, options),
                    "first start": partial(first_start, path, processor, options),
                    "next start": partial(next_start, path, processor, options),
                },
                options.repetitions,
            )
            streams[name] = partial(first_row, path, processor, options)
        streamed = common.interleaved(streams, options.repetitions)
    print(common.environment(options))
    print(f"{options.rows} rows, {options.processes} processes\n")
    figure = "looking through"
    tables = {}
    for name, measured in looking.items():
        tables[name] = common.ratio_table(measured, figure, "us a row", lower_is_better=True)
    figure = "first row of a stream"
    tables[figure] = common.ratio_table(streamed, figure, "s", lower_is_better=True)
    common.show(options, tables)


if __name__ == "__main__":
    main()
