"""What a pretrained language model must be able to do on text alone before anybody trains a SiQ-VL on it."""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.figure import Question
from siq_vl.parsing.answers import matches, parse
from siq_vl.pretraining.text import STEP_BY_STEP

# Question types held against the floors below: single look-ups, and sums of two terms reasoned step by step.
LOOK_UP_TYPES = ("value", "color", "text", "location")
LOOK_UP_FLOOR, SUM_FLOOR = 0.95, 0.90
_BATCH = 100

Described = tuple[str, Question]


def gate_accuracies(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    count: int = 100,
    types: Collection[str] | None = None,
    sample: Callable[..., Any] = figures.sample,
) -> dict[str, dict[str, float]]:
    """Return exact-match accuracies on unseen descriptions.

    Args:
        model: the language model alone, no picture.
        tokenizer: its tokenizer, which pads on the left.
        count: questions of each type, at most.
        types: question types to ask; all by default.
        sample: where the questions are from: split and index to a sample, with `seed`; the drawn figures by default.

    Returns:
        `"domain/type"` to `{"direct": accuracy, "steps": accuracy, "questions": how many}`, answers greedy.
    """
    model.eval()
    return {
        name: {
            "direct": _accuracy(model, tokenizer, asked, ""),
            "steps": _accuracy(model, tokenizer, asked, f" {STEP_BY_STEP}"),
            "questions": len(asked),
        }
        for name, asked in sorted(_described_questions(count, sample).items())
        if types is None or name.split("/")[1] in types
    }


def failures(accuracies: dict[str, dict[str, float]]) -> list[str]:
    """Return the gates that do not hold, as sentences."""
    found = []
    for name, row in accuracies.items():
        kind = name.split("/")[1]
        if kind in LOOK_UP_TYPES and row["steps"] < LOOK_UP_FLOOR:
            found.append(f"{name}: single look-up {row['steps']:.2f}, wanted {LOOK_UP_FLOOR}")
        if kind == "sum" and row["steps"] < SUM_FLOOR:
            found.append(f"{name}: two-term sum with reasoning {row['steps']:.2f}, wanted {SUM_FLOOR}")
    return found


def _described_questions(count: int, sample: Callable[..., Any]) -> dict[str, list[Described]]:
    """Return (description, question) pairs of the test split, at most `count` for each question type."""
    found: dict[str, list[Described]] = defaultdict(list)
    for index in range(60 * count):
        asked = sample("test", index, seed=-1)
        rows = found[f"{asked.figure.domain}/{asked.question.type}"]
        if len(rows) < count:
            rows.append((asked.figure.caption, asked.question))
    return found


@torch.inference_mode()
def _accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Described], instruction: str
) -> float:
    right = 0
    for start in range(0, len(asked), _BATCH):
        batch = asked[start : start + _BATCH]
        prompts = [
            f"<|im_start|>user\n{description}\n{question.text}{instruction}<|im_end|>\n<|im_start|>assistant\n"
            for description, question in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            matches(parse(text).answer, question.answer) for text, (_, question) in zip(texts, batch, strict=True)
        )
    return right / len(asked)
