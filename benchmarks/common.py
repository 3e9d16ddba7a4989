"""What the benchmarks share: models in which matrix products dominate, rows, interleaved timing, tables of ratios.

Importing it makes `siq_vl` importable, so that `python benchmarks/<name>.py` works from any folder.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.utils import logging as transformers_logging

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.configuration_siq_vl import SiQVLConfig  # noqa: E402
from siq_vl.data.figures.dataset import sample  # noqa: E402
from siq_vl.export.idefics3 import export_idefics3  # noqa: E402
from siq_vl.hub import card_table  # noqa: E402
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration  # noqa: E402
from siq_vl.processing_siq_vl import SiQVLProcessor  # noqa: E402
from siq_vl.results import write_results  # noqa: E402
from siq_vl.training.arguments import ModelArguments  # noqa: E402
from siq_vl.training.backbones import VISION_TOWER, model_config, stand_in_processor  # noqa: E402

# SigLIP-2 Large and Qwen2.5-0.5B at about a fortieth of their size: the tower has half of the language model's weights and
# reads four patches a token; the vocabulary holds a quarter of the latter.
_VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}
_TEXT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 5, "num_attention_heads": 6,
         "num_key_value_heads": 2, "vocab_size": 8192}  # fmt: skip
SHAPES = {
    "small": ({**_VISION, "image_size": 256, "patch_size": 16}, _TEXT),
    "small-512": ({**_VISION, "image_size": 512, "patch_size": 16}, _TEXT),  # 1024 patches, 256 tokens: the real share
    "quick": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 8},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 1024},
    ),
}  # fmt: skip
FULL = {"0.5b": "Qwen/Qwen2.5-0.5B-Instruct", "1.5b": "Qwen/Qwen2.5-1.5B-Instruct"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
table = card_table  # for tables that hold no ratios
Figures = Mapping[str, float]  # what one run of a variant measured, by name


def plain_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser for a benchmark that measures no time: its tables can be kept."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the tables in this file, too")
    return parser


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every timed benchmark has."""
    parser = plain_parser(description)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="small", choices=(*SHAPES, *FULL), help="random weights of these sizes")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="by default on a GPU alone")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch chooses")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: this process's processor time, for machines that do other work; without loader processes",
    )
    parser.add_argument("--quick", action="store_true", help="seconds, with figures that mean nothing: does it run?")
    return parser


def as_options(settings: Mapping[str, object]) -> list[str]:
    """Return settings as a command line that `parse_recipe` reads: the value `True` as the text `True`, and so on."""
    options = []
    for name, value in settings.items():
        options += [f"--{name}", str(value)]
    return options


def prepare(options: argparse.Namespace) -> argparse.Namespace:
    """Set up what the options say, and fill in those that depend on others."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU: run on one, or with --device cpu")
    if options.repetitions < 1:
        raise ValueError(f"repetitions is {options.repetitions}; it must be at least 1")
    if options.quick:
        options.shape, options.repetitions = "quick", 1
    if options.bf16 is None:
        options.bf16 = options.device == "cuda"
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    return options


def random_config(shape: str, **fields) -> tuple[SiQVLConfig, SiQVLProcessor]:
    """Return a configuration of one of the shapes and a processor whose ids it knows.

    Args:
        shape: a key of `SHAPES` or `FULL`.
        fields: further fields of the configuration.
    """
    if shape in FULL:
        config = model_config(ModelArguments(vision_tower=VISION_TOWER, language_model=FULL[shape]))
        for name, value in fields.items():
            setattr(config, name, value)
    else:
        vision, text = SHAPES[shape]
        text = {"model_type": "qwen2", "tie_word_embeddings": True, "max_position_embeddings": 32768, **text}
        ids = {"image_token_id": 0, "vision_start_token_id": 1, "vision_end_token_id": 2}
        config = SiQVLConfig(vision_config=dict(vision), text_config=text, **ids, **fields)
    processor = stand_in_processor(config)
    # Ids are those of the tiny tokenizer that stands in, whatever the configuration came with.
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(processor, name))
    config.text_config.bos_token_id = None
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    return config, processor


def random_model(shape: str, **fields) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return a model of one of the shapes with random weights, in evaluation mode, and its processor."""
    config, processor = random_config(shape, **fields)
    model = SiQVLForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(processor.tokenizer, name))
    return model.eval(), processor


def idefics3_twin(model, processor):
    """Return an Idefics3 model that computes what a SiQ-VL model without projector bias computes, and its processor."""
    with tempfile.TemporaryDirectory() as folder:
        export_idefics3(model, processor, Path(folder))
        return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def write_rows(folder: Path, count: int, *, long_share: float, seed: int = 0, images: int = 1) -> Path:
    """Write JPEG pictures and rows in LLaVA's format, of short answers and long captions; return the JSON file.

    A short answer has 1 to 4 words; a caption 120 to 220, some 900 characters, as ShareGPT4V's have on average (Chen et al.,
    2023). The words are those of the drawn figures' captions.

    Args:
        folder: where to write.
        count: number of rows.
        long_share: share of captions.
        seed: of words and pictures.
        images: pictures of a row.
    """
    rng, noise = Random(seed), np.random.default_rng(seed)
    words: list[str] = []
    for index in range(20):
        words += sample("train", index).figure.caption.split()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        names = [f"images/{index}-{number}.jpg" for number in range(images)]
        for name in names:
            # Noise in large patches, as in photos: fine noise would hardly compress, and take longer to decode.
            coarse = noise.integers(0, 256, (15, 20, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / name, quality=90)
        if rng.random() < long_share:
            question = "Describe this picture."
            answer = " ".join(rng.choices(words, k=rng.randint(120, 220)))
        else:
            question = " ".join(rng.choices(words, k=rng.randint(6, 14)))
            answer = " ".join(rng.choices(words, k=rng.randint(1, 4)))
        asked = {"from": "human", "value": "<image>\n" * images + question}
        rows.append({"image": names, "conversations": [asked, {"from": "gpt", "value": answer}]})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def stopwatch(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that returns the seconds since now, when all work given to the device is done."""
    clock = CLOCKS[options.clock]

    def seconds() -> float:
        synchronize(options.device)
        return clock() - started

    synchronize(options.device)
    started = clock()
    return seconds


class EpochEnds(TrainerCallback):
    """Notes when each epoch ends.

    Args:
        seconds: what `stopwatch` returned.

    Attributes:
        ends: seconds until the end of each epoch.
    """

    def __init__(self, seconds: Callable[[], float]):
        self.seconds = seconds
        self.ends: list[float] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(self.seconds())


def synchronize(device: str) -> None:
    """Wait for all work given to a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    variants: Mapping[str, Callable[[], Figures]], repetitions: int, *, warm_up: bool = True
) -> dict[str, list[Figures]]:
    """Measure variants in turn, again and again, so that what slows the machine down meets all alike.

    Args:
        variants: each a function that runs once and returns what it measured.
        repetitions: rounds that count.
        warm_up: a first round that does not count.
    """
    measured: dict[str, list[Figures]] = {name: [] for name in variants}
    first_round = 0
    if warm_up:
        first_round = -1
    for repetition in range(first_round, repetitions):
        # Back and forth: whoever runs first in one round runs last in the next.
        order = list(variants)
        if repetition % 2:
            order.reverse()
        for name in order:
            figures = variants[name]()
            if repetition >= 0:
                measured[name].append(figures)
    return measured


def ratio_table(
    measured: Mapping[str, Sequence[Figures]], figure: str, unit: str, *, lower_is_better: bool = False
) -> str:
    """Return one figure as a Markdown table: median and range of each variant, and of its ratio to the first one.

    Ratios are taken within a round; above 1 is better than the baseline.

    Args:
        measured: what `interleaved` returned; the first variant is the baseline.
        figure: which of the figures.
        unit: what it is measured in.
        lower_is_better: for times and sizes.
    """
    baseline = [each[figure] for each in next(iter(measured.values()))]
    lines = [f"| {figure} | {unit} | range | ratio | range of ratios |", "|---|---:|---:|---:|---:|"]
    for name, runs in measured.items():
        values = [each[figure] for each in runs]
        ratios = []
        for value, base in zip(values, baseline, strict=True):
            ratios.append(base / value if lower_is_better else value / base)
        cells = (f"{statistics.median(values):.4g}", _range(values), f"{statistics.median(ratios):.2f}", _range(ratios))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def environment(options: argparse.Namespace) -> str:
    """Say in a line what was measured on what."""
    device = f"CPU, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    precision = "bf16" if options.bf16 else "float32"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}; {versions}; {precision}; shape {options.shape}; median of {options.repetitions}, {options.clock} clock"


def keep(options: argparse.Namespace, tables: Mapping[str, str], figures: Mapping[str, object] | None = None) -> None:
    """Keep Markdown tables and further figures in the results file, if one is wanted."""
    if options.results is not None:
        write_results(options.results, tables, {"measured on": environment(options), **(figures or {})})


def show(options: argparse.Namespace, tables: Mapping[str, str]) -> None:
    """Print Markdown tables, and keep them in the results file, if one is wanted."""
    print("\n\n".join(tables.values()))
    keep(options, tables)
