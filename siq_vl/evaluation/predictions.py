"""What a model put out for a question, judged and kept in a file; and captions, scored fact by fact."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from siq_vl.data.figures.dataset import CAPTION_PROMPT
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation import metrics
from siq_vl.evaluation.generation import generate_texts
from siq_vl.evaluation.items import Item
from siq_vl.parsing.answers import Parsed, Reading, agrees, fact_score, matches, parse, read
from siq_vl.parsing.texts import pieces

# Kinds of fault. The first three are the data's: such a question is not in any score. The others count as wrong.
ROW, IMAGE, NO_GOLD, MODEL, EMPTY = "unreadable row", "unreadable image", "missing gold", "model error", "empty output"
NOT_SCORED = (ROW, IMAGE, NO_GOLD)

# How answers are compared with gold ones, and what kind of answer is read from an output for it. "words" compares words
# alone, for drawn figures; "number" also numbers of equal value, however written; the others are published metrics.
ANSWER_METRICS = {
    "words": "open",
    "number": "open",
    "exact_match": "open",
    "relaxed": "open",
    "vqa": "open",
    "anls": "open",
    "choice": "choice",
    "yes_no": "yes_no",
}


@dataclass(frozen=True)
class Prediction:
    """What one model put out for one question.

    Args:
        id: the question's, as `group`, `domain`, `type`, `multi_step` and `question` are: see `Item`.
        gold: the gold answer that reports show.
        output: the model's whole text.
        rationale: what was said before the answer.
        answer: what was answered; empty where nothing can be read as an answer.
        well_formed: whether the output ran `<think>…</think><answer>…</answer>`.
        correct: whether the score is at least one half.
        unparseable: whether no answer of the kind that the question asks for can be read; it counts as wrong.
        score: by the question's metric, between 0 and 1.
        stated: facts of the picture that the output states, where the true ones are known.
        contradicted: how many of them the picture contradicts.
        rouge_l: of the rationale against a reference rationale, where there is one.
        fault: one of this module's kinds, or the empty string.
        detail: what exactly happened.
        cut_off: whether the bound on new tokens ended the output.
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
    cut_off: bool = False

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


def judge(item: Item, output: str, fault: str = "", detail: str = "", *, cut_off: bool = False) -> Prediction:
    """Return an output as a prediction; an empty one and a missing gold answer are faults of their own.

    Raises:
        ValueError: the question's metric is unknown.
    """
    if item.metric not in ANSWER_METRICS:
        raise ValueError(f"metric is {item.metric!r}; it must be one of {', '.join(ANSWER_METRICS)}")
    found: Parsed | Reading
    if item.metric == "words":
        # Drawn figures have one right wording: the answer is taken as it stands.
        found = parse(output)
        parseable = bool(found.answer)
    else:
        found = read(output, kind=ANSWER_METRICS[item.metric], choices=item.choices)
        parseable = found.parseable
    score = 0.0
    if item.golds and parseable:
        score = _score(item, found.answer)
    stated = contradicted = rouge_l = None
    if item.caption:
        facts = metrics.hallucination(output, item.caption)
        stated = int(facts["stated"])
        contradicted = int(facts["contradicted"])
    if item.reasoning:
        rouge_l = metrics.rouge_l(found.rationale, item.reasoning)["score"]
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
        rationale=found.rationale,
        answer=found.answer,
        well_formed=found.well_formed,
        correct=score >= 0.5,
        unparseable=not parseable,
        score=score,
        stated=stated,
        contradicted=contradicted,
        rouge_l=rouge_l,
        fault=fault,
        detail=detail,
        cut_off=cut_off,
    )


def _score(item: Item, answer: str) -> float:
    """Return an answer's score by the question's metric."""
    if item.metric == "words":
        return float(any(matches(answer, gold) for gold in item.golds))
    if item.metric == "number":
        return float(agrees(answer, item.golds))
    if item.metric == "choice":
        return metrics.multiple_choice(answer, item.golds, item.choices)["score"]
    published = {
        "exact_match": metrics.exact_match,
        "relaxed": metrics.relaxed_accuracy,
        "vqa": metrics.vqa_accuracy,
        "anls": metrics.anls,
        "yes_no": metrics.pope,
    }
    return published[item.metric](answer, item.golds)["score"]


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as JSON lines, all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader finds the old file or the new one, never half of it.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_lines(predictions), encoding="utf-8")
    os.replace(temporary, path)


def _lines(predictions: Sequence[Prediction]) -> str:
    """Return predictions as lines of their file."""
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions]
    return "".join(lines)


def append_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Add predictions to a file, so that they outlive the process."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_lines(predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote.

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
            continue  # half a line of a killed process, or a prediction of another version: asked again
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
    ordered: list[Item] = []
    moved: list[Item] = []  # in the place of each item the next one of its domain, in that of the last the first
    for domain in sorted({item.domain for item in items}):
        of_domain = [item for item in items if item.domain == domain]
        ordered += of_domain
        moved += [*of_domain[1:], of_domain[0]]
    shown: dict[str, list[list]] = {
        "picture": [[item.image] for item in ordered],
        "blind": [[] for _ in ordered],
        "shuffled": [[item.image] for item in moved],
    }
    scores: dict[str, dict[str, float]] = {}
    for way, images in shown.items():
        prompts = [user_turn(CAPTION_PROMPT, len(pictures)) for pictures in images]
        captions = generate_texts(model, processor, prompts, images, progress=progress and f"{progress}, {way}")
        shares: dict[str, list[float]] = {item.domain: [] for item in ordered}
        for text, item in zip(captions, ordered, strict=True):
            shares[item.domain].append(fact_score(parse(text).answer, item.caption))
        scores[way] = {domain: sum(of_domain) / len(of_domain) for domain, of_domain in shares.items()}
    return scores
