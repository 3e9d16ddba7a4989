"""
The same held-out questions in every engine that a checkpoint is exported to: how many answers are the same, and how fast.

    python benchmarks/engines.py --count 100 --engines onnxruntime node chromium llama.cpp

Each engine reads what its own export wrote (export_onnx.py, export_gguf.py), with its own tokenizer and chat template where
it has them. "Same text" counts greedy outputs, reasoning included, that are PyTorch's to the letter; "same answer" those whose
final answer is; "right" those that are right. Speeds are tokens per second of processor time, one thread, the reading of
picture and question included; Chromium's is by the clock. Needs requirements-export.txt; `node` and `chromium` need
`npm ci --ignore-scripts` in web/ as well, and `chromium` playwright and a browser.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.evaluation.generation import rendered  # noqa: E402
from siq_vl.evaluation.held_out import held_out_items  # noqa: E402
from siq_vl.evaluation.items import Item  # noqa: E402
from siq_vl.evaluation.tables import markdown  # noqa: E402
from siq_vl.loading import load_checkpoint  # noqa: E402
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration  # noqa: E402
from siq_vl.parsing.answers import matches, parse  # noqa: E402
from siq_vl.processing_siq_vl import SiQVLProcessor  # noqa: E402
from siq_vl.results import checksum_of_weights, write_results  # noqa: E402

MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Answer:
    """What an engine said; `tokens` counts those that it generated, `seconds` what they and the prompt took."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What engines are asked with: the checkpoint, its questions, and the folder that exports and answers go to."""

    model: SiQVLForConditionalGeneration
    processor: SiQVLProcessor
    items: Sequence[Item]
    folder: Path

    def questions(self) -> Path:
        """Write the pictures and questions as files, and return the list of them."""
        entries = []
        for place, item in enumerate(self.items):
            item.image.save(self.folder / f"{place}.png")
            entries.append({"image": f"{place}.png", "question": item.question})
        path = self.folder / "questions.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path


def in_torch(asked: Asked) -> list[Answer]:
    """Return the answers of the checkpoint itself, one question at a time, as engines are asked."""
    answers = []
    for item in asked.items:
        inputs = _inputs(asked, item)
        begin = time.process_time()
        with torch.inference_mode():
            output = asked.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        seconds = time.process_time() - begin
        tokens = output[:, inputs["input_ids"].shape[1] :]
        answers.append(
            Answer(asked.processor.batch_decode(tokens, skip_special_tokens=True)[0], tokens.shape[1], seconds)
        )
    return answers


def in_onnxruntime(asked: Asked, kind: str) -> list[Answer]:
    """Return the answers of onnxruntime in Python."""
    from siq_vl.export.onnx_model import OnnxModel

    model = OnnxModel(asked.folder / "onnx", kind, threads=1)
    answers = []
    for item in asked.items:
        inputs = _inputs(asked, item)
        begin = time.process_time()
        tokens = list(model.generate(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy(), MAX_NEW_TOKENS))
        seconds = time.process_time() - begin
        answers.append(Answer(asked.processor.decode(tokens, skip_special_tokens=True), len(tokens), seconds))
    return answers


def in_node(asked: Asked, kind: str) -> list[Answer]:
    """Return the answers of transformers.js in Node, which prepares text and pictures itself."""
    made = asked.folder / "node.json"
    script = str(REPO_ROOT / "web" / "answer.mjs")
    files = [str(asked.folder / "onnx"), str(asked.questions()), str(made)]
    subprocess.run(["node", script, *files, kind, str(MAX_NEW_TOKENS)], check=True)
    entries = json.loads(made.read_text(encoding="utf-8"))
    return [Answer(entry["text"], len(entry["tokens"]), entry["seconds"]) for entry in entries]


def _inputs(asked: Asked, item: Item) -> dict:
    text = rendered(asked.processor, item.messages, {})
    return asked.processor(images=list(item.images), text=text, return_tensors="pt")


KINDS: dict[str, tuple[Callable[[Asked, str], list[Answer]], tuple[str, ...]]] = {
    "onnxruntime": (in_onnxruntime, ("fp32", "fp16", "int8", "q4")),
    "node": (in_node, ("fp32", "fp16", "int8", "q4")),
}


def row(
    engine: str, kind: str, answers: Sequence[Answer], reference: Sequence[Answer], asked: Asked, size: str
) -> list:
    """Return the cells of an engine's line."""
    same_text = same_answer = right = 0
    for answer, original, item in zip(answers, reference, asked.items, strict=True):
        final = parse(answer.text).answer
        same_text += answer.text == original.text
        same_answer += final == parse(original.text).answer
        right += final is not None and any(matches(final, gold) for gold in item.golds)
    speed = sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)
    counts = [str(same_text), str(same_answer), str(right), str(len(answers))]
    return [engine, kind, size, *counts, f"{speed:.0f}"]


def size_of(asked: Asked, engine: str, kind: str) -> str:
    """Return the size of what an engine reads, in MiB."""
    from siq_vl.export.onnx_sessions import SESSIONS, SUFFIXES

    files = [asked.folder / "onnx" / "onnx" / f"{name}{SUFFIXES[kind]}.onnx" for name in SESSIONS]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPO_ROOT), help="a checkpoint's folder")
    parser.add_argument("--count", type=int, default=100, help="held-out questions")
    parser.add_argument("--engines", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=REPO_ROOT / "outputs" / "engines", help="for what is exported")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the table in this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_checkpoint(options.model)
    items = [item for item in held_out_items(options.count) if item.group == "held out"]
    options.folder.mkdir(parents=True, exist_ok=True)
    asked = Asked(model, processor, items, options.folder)
    reference = in_torch(asked)
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
    lines = [["engine", "weights", "MiB", "same text", "same answer", "right", "of", "tokens/s"]]
    lines.append(row("PyTorch", "fp32", reference, reference, asked, f"{weights:.1f}"))
    for engine in options.engines:
        answer, kinds = KINDS[engine]
        for kind in kinds:
            lines.append(row(engine, kind, answer(asked, kind), reference, asked, size_of(asked, engine, kind)))
            print(lines[-1], flush=True)
    table = markdown(lines)
    print(table)
    if options.results is not None:
        write_results(options.results, {"engines": table}, {"weights": {"model": checksum_of_weights(options.model)}})


if __name__ == "__main__":
    main()
