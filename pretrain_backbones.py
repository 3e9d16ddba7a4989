"""
Stage 0: pretrain the tiny backbones that stand in for SigLIP-2 and Qwen2.5, and write them to `backbones/`.

    python pretrain_backbones.py --phase text     # the language model, on text alone
    python pretrain_backbones.py --phase vision   # the vision tower, with a dense sigmoid loss
    python pretrain_backbones.py --phase captions # the language model again: captions between the text
    python pretrain_backbones.py --phase export   # check the gates, write backbones/

    python pretrain_backbones.py --phase letters  # another tower, which reads at any place: its letters
    python pretrain_backbones.py --phase world    # the same tower on the whole drawn world
    python pretrain_backbones.py --phase export_tower  # measure what it reads, write backbones/siglip2-reading/
    python pretrain_backbones.py --phase world_text    # a language model, on the text of the drawn world
    python pretrain_backbones.py --phase world_captions  # the same model: captions of its pictures between the text

`text` and `vision` are independent of each other; `captions` needs both; `world` needs `letters`, and
`world_captions` needs `world_text` and the exported tower. Every phase resumes where it was stopped, runs on a GPU where
there is one, and logs its losses and seconds to `outputs/backbones/<phase>/log.jsonl`.
"""

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from siq_vl import cli
from siq_vl.data.world import dataset as world
from siq_vl.data.world.scatter import scattered
from siq_vl.locks import Lock
from siq_vl.pretraining import captions, loop, reading, reading_accuracy, text, vision, world_text
from siq_vl.pretraining.gates import failures, gate_accuracies
from siq_vl.pretraining.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=torch.nn.Module)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer, trained on first use and the same ever after."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(text.corpus()).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_module(folder: Path, module: Module) -> Module:
    """Load the weights that a phase has reached into `module`."""
    path = folder / "state.pt"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `--phase {folder.name}` first")
    module.load_state_dict(torch.load(path, weights_only=True)["module"])
    return module


def train_text(options: argparse.Namespace, device: torch.device) -> None:
    """Train the language model on text."""
    tokenizer = load_tokenizer(options.work / "tokenizer")
    model = text.language_model(tokenizer).to(device)
    batch_at = text.TextBatches(tokenizer, options.batch_size, options.seed, look_up_steps=text.LOOK_UP_STEPS)

    def losses_at(step: int) -> loop.Losses:
        return {"text": model(**{name: tensor.to(device) for name, tensor in batch_at(step).items()}).loss}

    loop.run(model, losses_at, options.work / "text", steps=options.steps, learning_rate=options.learning_rate)


def train_world_text(options: argparse.Namespace, device: torch.device) -> None:
    """Train a language model on the text of the drawn world, then check its gates."""
    folder = options.work / "world_tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(world_text.corpus()).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    model = text.language_model(tokenizer).to(device)
    batch_at = world_text.WorldTextBatches(
        tokenizer,
        options.batch_size,
        options.seed,
        look_up_steps=world_text.LOOK_UP_STEPS,
        calculation_steps=world_text.CALCULATION_STEPS,
    )

    def losses_at(step: int) -> loop.Losses:
        return {"text": model(**{name: tensor.to(device) for name, tensor in batch_at(step).items()}).loss}

    loop.run(model, losses_at, options.work / "world_text", steps=options.steps, learning_rate=options.learning_rate)
    accuracies = gate_accuracies(model, tokenizer, options.count, sample=world.sample)
    (options.work / "world_text" / "gates.json").write_text(json.dumps(accuracies, indent=2) + "\n")
    for name, row in accuracies.items():
        logger.info("%-24s direct %.2f  steps %.2f  (%d)", name, row["direct"], row["steps"], row["questions"])
    logger.info("gates missed: %s", "; ".join(failures(accuracies)) or "none")


def train_vision(options: argparse.Namespace, device: torch.device) -> None:
    """Train the vision tower on the words of each cell."""
    words = vision.figure_words()
    word_ids = {word: index for index, word in enumerate(words)}
    model = vision.TowerWithWordHead(len(words)).to(device)
    size = options.batch_size

    def losses_at(step: int) -> loop.Losses:
        samples = [vision.figures.sample("train", step * size + offset, seed=options.seed) for offset in range(size)]
        return {"words": model(vision.pixel_batch(samples).to(device), vision.cell_words(samples, word_ids).to(device))}

    loop.run(model, losses_at, options.work / "vision", steps=options.steps, learning_rate=options.learning_rate)
    samples = [vision.figures.sample("test", index, seed=-1, hard=False) for index in range(600)]
    logger.info("cells read exactly, unseen pictures: %.3f", vision.read_accuracy(model.cpu().eval(), words, samples))


def train_letters(options: argparse.Namespace, device: torch.device) -> None:
    """Train a tower to read: the characters of each patch, then the words of each cell too, on small crowded pictures."""
    module = reading.ReadingTower(reading.SMALL_SIDE).to(device)
    size = options.batch_size

    def losses_at(step: int) -> loop.Losses:
        indices = range(step * size, (step + 1) * size)
        pictures = [scattered(Random(f"letters/{options.seed}/{index}"), module.side) for index in indices]
        losses = reading.batch_losses(module, pictures)
        wanted = ("letters", "seen") if step >= reading.LETTERS_ALONE else ("letters",)
        return {name: losses[name] for name in wanted}

    run_reading(module, losses_at, options.work / "letters", options)


def train_world(options: argparse.Namespace, device: torch.device) -> None:
    """Train the tower that reads on the whole drawn world, at its full size: characters, words, and facts.

    It begins with what phase `letters` has reached in the same `--work` folder, or else with `backbones/`.
    """
    module = reading.ReadingTower(reading.SIDE)
    letters = options.work / "letters" / "state.pt"
    if letters.exists():
        reading.load_smaller(module, torch.load(letters, weights_only=True)["module"])
    else:
        module = reading.load_reading_tower(options.backbones / "siglip2-reading")
    module.to(device)
    size = options.batch_size

    def losses_at(step: int) -> loop.Losses:
        indices = range(step * size, (step + 1) * size)
        return reading.batch_losses(module, [reading.world_picture("train", index, options.seed) for index in indices])

    run_reading(module, losses_at, options.work / "world", options)


def export_tower(options: argparse.Namespace, device: torch.device) -> None:
    """Write the tower that phase `letters` or `world` has reached, and what it reads."""
    side = {"letters": reading.SMALL_SIDE, "world": reading.SIDE}[options.reached]
    module = load_module(options.work / options.reached, reading.ReadingTower(side)).eval()
    folder = options.backbones / "siglip2-reading"
    reading.save_reading_tower(module, folder)
    vision.image_processor(side).save_pretrained(folder)
    lines = (options.work / options.reached / "log.jsonl").read_text().splitlines()
    read = reading_accuracy.measured(module, options.count, options.font)
    for table, rows in read.items():
        for name, row in rows.items():
            logger.info("%-8s %-50s %s", table, name, {key: round(value, 3) for key, value in row.items()})
    told = {"phase": options.reached, "training": json.loads(lines[-1]), **read}
    (folder / "measured.json").write_text(json.dumps(told, indent=2) + "\n")
    for phase in ("letters", "world"):
        log = options.work / phase / "log.jsonl"
        if log.exists():
            (folder / f"{phase}.jsonl").write_text(log.read_text())


def run_reading(
    module: reading.ReadingTower, losses_at: Callable[[int], loop.Losses], folder: Path, options: argparse.Namespace
) -> None:
    """Train a tower with Muon and AdamW, at one rate that falls over the last three tenths of the steps."""
    if options.compile:
        module.compile()  # its weights keep their names
    loop.run(
        module,
        losses_at,
        folder,
        steps=options.steps,
        learning_rate=options.learning_rate,
        optimizer=reading.MuonAndAdamW(module, options.learning_rate),
        factor_at=loop.steady_then_down,
        save_every=200,
    )


def build_captioner(work: Path, reached: str) -> tuple[captions.Captioner, PreTrainedTokenizerFast]:
    """Return the captioner with the language model of phase `reached`, `"text"` or `"captions"`."""
    tokenizer = load_tokenizer(work / "tokenizer")
    tower = load_module(work / "vision", vision.TowerWithWordHead(len(vision.figure_words()))).tower
    language_model = text.language_model(tokenizer)
    model = captions.Captioner(tower, language_model, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    load_module(work / reached, language_model if reached == "text" else model)
    return model, tokenizer


def train_captions(options: argparse.Namespace, device: torch.device) -> None:
    """Train the language model on captions of figures and text in turn."""
    model, tokenizer = build_captioner(options.work, "text")
    seed = options.seed + 1
    text_at = text.TextBatches(tokenizer, options.text_batch_size, seed, calculation_steps=text.CALCULATION_STEPS)
    batch_at = partial(captions.figure_batch, size=options.batch_size, seed=seed)
    run_captions(model.to_device(device), tokenizer, batch_at, text_at, options.work / "captions", options)


def train_world_captions(options: argparse.Namespace, device: torch.device) -> None:
    """Train the language model of the drawn world on captions of its pictures and text in turn."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.work / "world_tokenizer")
    language_model = load_module(options.work / "world_text", text.language_model(tokenizer))
    tower = reading.load_reading_tower(options.backbones / "siglip2-reading").tower
    model = captions.Captioner(tower, language_model, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    seed = options.seed + 1
    text_at = world_text.WorldTextBatches(tokenizer, options.text_batch_size, seed)
    batch_at = partial(captions.world_batch, size=options.batch_size, seed=seed)
    run_captions(model.to_device(device), tokenizer, batch_at, text_at, options.work / "world_captions", options)


def run_captions(
    model: captions.Captioner,
    tokenizer: PreTrainedTokenizerFast,
    batch_at: Callable[[int], captions.Captioned],
    text_at: text.TextBatches,
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """Train a captioner; each step has a batch of captions and one of text."""
    device = model.projector.weight.device

    def losses_at(step: int) -> loop.Losses:
        pixels, told = batch_at(step)
        rows = captions.caption_rows(tokenizer, told, model.image_tokens)
        rows = {name: tensor.to(device) for name, tensor in rows.items()}
        read = {name: tensor.to(device) for name, tensor in text_at(step).items()}
        return {"caption": model.caption_loss(pixels.to(device), rows), "text": model.language_model(**read).loss}

    loop.run(model, losses_at, folder, steps=options.steps, learning_rate=options.learning_rate)


def export(options: argparse.Namespace, device: torch.device) -> None:
    """Check the language model's gates on text, then write both backbones and what was measured of them."""
    words = vision.figure_words()
    with_head = load_module(options.work / "vision", vision.TowerWithWordHead(len(words))).eval()
    samples = [vision.figures.sample("test", index, seed=-1, hard=False) for index in range(600)]
    read = vision.read_accuracy(with_head, words, samples)
    logger.info("vision tower: cells read exactly, unseen pictures: %.3f", read)
    model, tokenizer = build_captioner(options.work, "captions")
    accuracies = gate_accuracies(model.language_model.to(device), tokenizer)
    for name, row in accuracies.items():
        logger.info(
            "%-24s direct %.2f  steps %.2f  (%d questions)", name, row["direct"], row["steps"], row["questions"]
        )
    missed = failures(accuracies)
    if missed:
        logger.warning("the language model misses gates on text; train `--phase text` longer: %s", "; ".join(missed))
    tower_folder, text_folder = options.backbones / "siglip2-tiny", options.backbones / "qwen2.5-tiny"
    with_head.tower.save_pretrained(tower_folder)
    vision.image_processor().save_pretrained(tower_folder)
    model.language_model.cpu().save_pretrained(text_folder)
    tokenizer.save_pretrained(text_folder)
    logs = {
        phase: (options.work / phase / "log.jsonl").read_text().splitlines() for phase in ("text", "vision", "captions")
    }
    measured = {
        "cells_read": read,
        "gates": accuracies,
        "gates_missed": missed,
        "training": {phase: json.loads(lines[-1]) for phase, lines in logs.items()},
    }
    (options.backbones / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")


PHASES = {
    "text": (train_text, {"steps": 2400, "batch_size": 32, "learning_rate": 1.5e-3}),
    "vision": (train_vision, {"steps": 4000, "batch_size": 64, "learning_rate": 1e-3}),
    "captions": (train_captions, {"steps": 1200, "batch_size": 16, "learning_rate": 1.5e-3}),
    "world_captions": (train_world_captions, {"steps": 4000, "batch_size": 16, "learning_rate": 1.5e-3}),
    "world_text": (train_world_text, {"steps": 4000, "batch_size": 32, "learning_rate": 1.5e-3}),
    "letters": (train_letters, {"steps": 3800, "batch_size": 16, "learning_rate": 1.5e-3}),
    "world": (train_world, {"steps": 20000, "batch_size": 16, "learning_rate": 1.5e-3}),
    "export": (export, {}),
    "export_tower": (export_tower, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=tuple(PHASES), required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--text_batch_size", type=int, default=32, help="rows of text beside the captions' batch")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--work", type=Path, default=Path("outputs/backbones"))
    parser.add_argument("--backbones", type=Path, default=Path("backbones"))
    parser.add_argument(
        "--compile", action="store_true", help="compile the tower: twice as fast on a CPU, needs a compiler"
    )
    parser.add_argument("--reached", choices=("letters", "world"), default="world", help="phase to export the tower of")
    parser.add_argument("--count", type=int, default=200, help="pictures for each row of what an exported tower reads")
    parser.add_argument("--font", action="append", default=[], help="path of a further font that it is to read")
    options = parser.parse_args()
    function, defaults = PHASES[options.phase]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with Lock(options.backbones if options.phase.startswith("export") else options.work / options.phase):
        function(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    cli.run(main)
