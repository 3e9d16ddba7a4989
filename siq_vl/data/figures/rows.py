"""Drawn figures as prompt/completion rows, drawn when they are read: for training (TRL) and for evaluation."""

from collections.abc import Mapping
from functools import partial
from random import Random

from datasets import Dataset

from siq_vl.data.figures.dataset import CAPTION_PROMPT, FigureSample, rationale, sample

TASKS = ("caption", "answer", "reason")
CAPTION_PROMPTS = (CAPTION_PROMPT, "What is in the picture?", "Describe this picture.")


def user_turn(text: str, images: int = 1) -> list[dict]:
    """Return a prompt: `images` pictures, then `text`, as one user message."""
    content: list[dict] = []
    for _ in range(images):
        content.append({"type": "image"})
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def assistant_turn(text: str) -> list[dict]:
    """Return a completion: `text` as one assistant message."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def reasoned(reasoning: str, answer: str) -> str:
    """Return a completion that reasons before it answers, the format of stage 3."""
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def row(
    drawn: FigureSample, task: str, *, style: str = "structured", direct_share: float = 0.0, blind: bool = False
) -> dict:
    """Return one training row: `images`, `prompt`, `completion` and, in stage 3, `chat_template_kwargs`.

    Args:
        drawn: the sample.
        task: `"caption"` (stage 1), `"answer"` (stage 2, the answer alone) or `"reason"` (stage 3).
        style: style of the rationale in `"reason"` rows.
        direct_share: share of `"reason"` rows that answer without reasoning, asked for by the chat template's
            `enable_thinking=False`.
        blind: withhold the picture.

    Raises:
        ValueError: unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    rng = Random(f"{drawn.seed}/row")
    images = []
    if not blind:
        images.append(drawn.image)
    if task == "caption":
        return _row(images, rng.choice(CAPTION_PROMPTS), drawn.figure.caption)
    if task == "answer":
        return _row(images, drawn.question.text, drawn.question.answer)
    # Which rows answer directly is drawn by sample: it depends neither on the style nor on the epoch.
    thinking = rng.random() >= direct_share
    reasoning = ""
    if thinking:
        reasoning = rationale(drawn.figure, drawn.question, style)
    made = _row(images, drawn.question.text, reasoned(reasoning, drawn.question.answer))
    return {**made, "chat_template_kwargs": {"enable_thinking": thinking}}


def _row(images: list, prompt: str, completion: str) -> dict:
    return {"images": images, "prompt": user_turn(prompt, len(images)), "completion": assistant_turn(completion)}


def training_rows(split: str, count: int, task: str, *, seed: int = 0, **row_options) -> Dataset:
    """Return `count` rows of a split as a map-style dataset that draws each row when it is read.

    Args:
        split: one of `dataset.SPLITS`.
        count: number of rows.
        task: see `row`, as for `row_options`.
        seed: stream of samples; training stages use one each.
    """
    draw = partial(_draw, split=split, task=task, seed=seed, row_options=row_options)
    return Dataset.from_dict({"index": range(count)}).with_transform(draw)


def _draw(batch: Mapping, split: str, task: str, seed: int, row_options: Mapping) -> dict[str, list]:
    rows = [row(sample(split, index, seed=seed), task, **row_options) for index in batch["index"]]
    columns = {}
    for name in rows[0]:
        columns[name] = [made[name] for made in rows]
    return columns
