"""
What the held-out questions are worth: how many are distinct, which were described in stage 0, what repetition costs.

    python benchmarks/questions.py
    python benchmarks/questions.py --predictions outputs/evaluation/stage3.jsonl

Figures are drawn at random, so some contents come up twice. Intervals take all questions for independent; answers about
one content may agree. If they always did, half-widths would be wider by the square root of the mean number of questions
that share a question's content. With `--predictions`, what it is for a model's answers: the ratio of the standard error
with contents as clusters to that of independent questions.

Stage 0 never saw a held-out picture, but its tokenizer was trained on text about combinations, as a language model has
read of what it never saw drawn. A figure counts as described where its content is in that text.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import common

from siq_vl.data.figures.dataset import FigureSample, sample
from siq_vl.evaluation.held_out import EVALUATION_SEED
from siq_vl.evaluation.predictions import read_predictions
from siq_vl.evaluation.statistics import clustered_ratio
from siq_vl.evaluation.tables import markdown
from siq_vl.results import write_results

# Rows of stage 0 (`pretrain_backbones.py`): of the tokenizer's corpus in each split, and of each phase of the language
# model, which reads the split `train` alone, with the phase's seed.
CORPUS_ROWS = 40_000
PHASES = {1000: 2400 * 32, 1001: 1200 * 32}


def evaluated(count: int) -> dict[str, list[FigureSample]]:
    """Return the evaluation's samples by row of its table."""
    ordinary = [sample("test", index, seed=EVALUATION_SEED, hard=False) for index in range(count)]
    rows = {}
    for domain in ("scenes", "charts", "documents"):
        rows[domain] = [each for each in ordinary if each.figure.domain == domain]
    rows["all"] = ordinary
    for name, split, hard in (("new combinations", "combinations", False), ("hard", "test", True)):
        rows[name] = [sample(split, index, seed=EVALUATION_SEED, hard=hard) for index in range(count // 5)]
    return rows


def contents(split: str, seed: int, count: int) -> set[str]:
    """Return the contents of the first samples of a split."""
    return {sample(split, index, seed=seed).figure.content for index in range(count)}


def read_in_stage_0(share: float) -> tuple[set[str], set[str]]:
    """Return the contents in the text that the tokenizer was trained on, and in the language model's.

    Args:
        share: of each text to look through, from its first row.
    """
    of_tokenizer: set[str] = set()
    for split in ("train", "combinations"):
        of_tokenizer |= contents(split, -1, round(share * CORPUS_ROWS))
    of_model: set[str] = set()
    for seed, count in PHASES.items():
        of_model |= contents("train", seed, round(share * count))
    return of_tokenizer, of_model


def widest(samples: Sequence[FigureSample]) -> float:
    """Return how many times as wide a half-width would be, were all answers about one content alike."""
    sizes = Counter(each.figure.content for each in samples).values()
    return math.sqrt(sum(size**2 for size in sizes) / len(samples))


def main() -> None:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--count", type=int, default=900, help="ordinary questions, as of `evaluate_vqa.py`")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of stage 0's text to look through, from the first row"
    )
    parser.add_argument("--predictions", type=Path, help="answers that `evaluate_vqa.py` kept, of as many questions")
    options = parser.parse_args()
    rows = evaluated(options.count)
    tokenizer_read, model_read = read_in_stage_0(options.share)
    lines = [
        ["held-out questions", "n", "contents", "in the tokenizer's text", "in the language model's text", "widest"]
    ]
    for name, samples in rows.items():
        found = {each.figure.content for each in samples}
        counts = (len(samples), len(found), len(found & tokenizer_read), len(found & model_read))
        lines.append([name, *map(str, counts), f"{widest(samples):.2f}"])
    table = markdown(lines)
    print(table)
    figures = {}
    if options.predictions is not None:
        score_of = {prediction.id: prediction.score for prediction in read_predictions(options.predictions)}
        scores, clusters = [], []
        for drawn in rows["all"]:
            if drawn.seed in score_of:
                scores.append(score_of[drawn.seed])
                clusters.append(drawn.figure.content)
        ratio = clustered_ratio(scores, clusters)
        figures["clustered_ratio"] = round(ratio, 3)
        print(
            f"\nstandard error with contents as clusters: {ratio:.3f} times that of {len(scores)} independent questions"
        )
    if options.results is not None:
        write_results(options.results, {"questions": table}, figures)


if __name__ == "__main__":
    main()
