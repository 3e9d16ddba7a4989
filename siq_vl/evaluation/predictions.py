"""Running a checkpoint over questions and captions, and keeping what it said in a file."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from siq_vl.data.figures.dataset import CAPTION_PROMPT
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.answers import fact_score, matches, parse
from siq_vl.evaluation.figures import Item
from siq_vl.evaluation.generation import generate_texts
from siq_vl.processing_siq_vl import SiQVLProcessor


@dataclass(frozen=True)
class Prediction:
    """What one model said to one question. `output` is its whole text; an unreadable answer counts as wrong."""

    id: str
    group: str
    domain: str
    type: str
    multi_step: bool
    question: str
    gold: str
    output: str
    rationale: str
    answer: str
    well_formed: bool
    correct: bool


def predict(
    model: PreTrainedModel,
    processor: SiQVLProcessor,
    items: Sequence[Item],
    *,
    blind: bool = False,
    progress: str | None = None,
) -> list[Prediction]:
    """Return the model's greedy answers, in the items' order; `blind` withholds every picture."""
    outputs = generate_texts(
        model,
        processor,
        [user_turn(item.question, 0 if blind else 1) for item in items],
        [[] if blind else [item.image] for item in items],
        progress=progress,
    )
    return [judge(item, output) for item, output in zip(items, outputs, strict=True)]


def judge(item: Item, output: str) -> Prediction:
    """Parse an output and compare its answer with the gold one."""
    parsed = parse(output)
    return Prediction(
        id=item.id,
        group=item.group,
        domain=item.domain,
        type=item.type,
        multi_step=item.multi_step,
        question=item.question,
        gold=item.answer,
        output=output,
        rationale=parsed.rationale,
        answer=parsed.answer,
        well_formed=parsed.well_formed,
        correct=matches(parsed.answer, item.answer),
    )


def write(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as JSON lines, all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(asdict(prediction)) + "\n" for prediction in predictions))
    os.replace(temporary, path)


def read(path: Path) -> list[Prediction]:
    """Read what `write` wrote.

    Raises:
        ValueError: there is no such file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: run evaluate_vqa.py for this model first")
    return [Prediction(**json.loads(line)) for line in path.read_text().splitlines()]


def caption_scores(
    model: PreTrainedModel, processor: SiQVLProcessor, items: Sequence[Item], *, progress: str | None = None
) -> dict[str, dict[str, float]]:
    """Return the mean share of caption facts that are right, by domain, from the right picture and from none or another's.

    Returns:
        `{"picture" | "blind" | "shuffled": {domain: share}}`; `"shuffled"` shows each item the picture of another one
        of its domain.
    """
    domains = sorted({item.domain for item in items})
    by_domain = {domain: [item for item in items if item.domain == domain] for domain in domains}
    ordered = [item for domain in domains for item in by_domain[domain]]
    moved = [item for domain in domains for item in (*by_domain[domain][1:], by_domain[domain][0])]
    shown = {
        "picture": [[item.image] for item in ordered],
        "blind": [[] for _ in ordered],
        "shuffled": [[item.image] for item in moved],
    }
    scores: dict[str, dict[str, float]] = {}
    for way, images in shown.items():
        prompts = [user_turn(CAPTION_PROMPT, len(pictures)) for pictures in images]
        captions = generate_texts(model, processor, prompts, images, progress=progress and f"{progress}, {way}")
        marks = [fact_score(parse(text).answer, item.caption) for text, item in zip(captions, ordered, strict=True)]
        scores[way] = {
            domain: sum(mark for mark, item in zip(marks, ordered, strict=True) if item.domain == domain)
            / len(by_domain[domain])
            for domain in domains
        }
    return scores
