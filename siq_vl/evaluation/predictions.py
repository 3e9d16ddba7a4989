"""What a model said to a question, judged and kept in a file; and captions, scored fact by fact."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from siq_vl.data.figures.dataset import CAPTION_PROMPT
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.generation import generate_texts
from siq_vl.evaluation.items import Item
from siq_vl.evaluation.marking import mark
from siq_vl.parsing.answers import fact_score, parse
from siq_vl.parsing.texts import pieces

# Kinds of fault. The first three are the data's: such a question is not in any score. The others count as wrong.
ROW, IMAGE, NO_GOLD, MODEL, EMPTY = "unreadable row", "unreadable image", "missing gold", "model error", "empty output"
NOT_SCORED = (ROW, IMAGE, NO_GOLD)


@dataclass(frozen=True)
class Prediction:
    """What one model said to one question. `output` is its whole text; an unreadable answer counts as wrong.

    `fault` is one of this module's kinds, or the empty string, and `detail` says what exactly happened. The other
    fields are the question's, see `Item`, and its marks, see `Marks`.
    """

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
    unparseable: bool = False
    score: float | None = None
    stated: int | None = None
    contradicted: int | None = None
    rouge_l: float | None = None
    fault: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        if self.score is None:
            object.__setattr__(self, "score", float(self.correct))

    @property
    def scored(self) -> bool:
        """Whether the question counts in scores."""
        return self.fault not in NOT_SCORED

    @property
    def hallucinated(self) -> bool:
        """Whether the output states a fact that the picture contradicts."""
        return bool(self.contradicted)

    @property
    def length(self) -> int:
        """Pieces of the rationale: words, numbers and punctuation marks."""
        return len(pieces(self.rationale))


def predict(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    *,
    blind: bool = False,
    progress: str | None = None,
) -> list[Prediction]:
    """Return the model's greedy answers, in the items' order; `blind` withholds every picture.

    Meant for questions known to be sound; `runner.run` survives faults and interruptions.
    """
    outputs = generate_texts(
        model,
        processor,
        [item.prompt(blind) for item in items],
        [[] if blind else item.open_images() for item in items],
        progress=progress,
    )
    return [judge(item, output) for item, output in zip(items, outputs, strict=True)]


def judge(item: Item, output: str, fault: str = "", detail: str = "") -> Prediction:
    """Mark an output; an empty one and a missing gold answer are faults of their own."""
    marks = mark(item, output)
    if not fault and not item.golds:
        fault, detail = NO_GOLD, "the row has no answer to compare with"
    if not fault and not output.strip():
        fault, detail = EMPTY, "the model ended its turn at once"
    return Prediction(
        id=item.id,
        group=item.group,
        domain=item.domain,
        type=item.type,
        multi_step=item.multi_step,
        question=item.question,
        gold=item.answer,
        output=output,
        rationale=marks.rationale,
        answer=marks.answer,
        well_formed=marks.well_formed,
        correct=marks.score >= 0.5,
        unparseable=marks.unparseable,
        score=marks.score,
        stated=marks.stated,
        contradicted=marks.contradicted,
        rouge_l=marks.rouge_l,
        fault=fault,
        detail=detail,
    )


def write(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as JSON lines, all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(line_of, predictions)), encoding="utf-8")
    os.replace(temporary, path)


def line_of(prediction: Prediction) -> str:
    """Return a prediction as one line of its file."""
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"


def append(predictions: Sequence[Prediction], path: Path) -> None:
    """Add predictions to a file, so that they outlive the process."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(line_of, predictions)))


def read(path: Path) -> list[Prediction]:
    """Read what `write` wrote.

    Raises:
        ValueError: there is no such file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: run evaluate_vqa.py for this model first")
    return [Prediction(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def cut_half_line(path: Path) -> None:
    """Cut off the line that a killed process left half written, so that others can be appended."""
    if path.exists():
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_unfinished(path: Path) -> dict[str, Prediction]:
    """Return by id what a run has written so far, the last of each; lines that are no predictions are dropped."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            prediction = Prediction(**json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            continue
        found[prediction.id] = prediction
    return found


def caption_scores(
    model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[Item], *, progress: str | None = None
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
    shown: dict[str, list[list]] = {
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
