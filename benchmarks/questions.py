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

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.data.figures.dataset import FigureSample, sample  # noqa: E402
from siq_vl.evaluation.held_out import EVALUATION_SEED  # noqa: E402
from siq_vl.evaluation.predictions import read  # noqa: E402
from siq_vl.evaluation.statistics import clustered_ratio  # noqa: E402
from siq_vl.evaluation.tables import markdown  # noqa: E402
from siq_vl.results import write_results  # noqa: E402

# Rows of stage 0 (`pretrain_backbones.py`): of the tokenizer's corpus in each split, and of each phase of the language
# model, which reads the split `train` alone, with the phase's seed.
CORPUS_ROWS = 40_000
PHASES = {1000: 2400 * 32, 1001: 1200 * 32}


def evaluated(count: int) -> dict[str, list[FigureSample]]:
    """Return the evaluation's samples by row of its table."""
    ordinary = [sample("test", index, seed=EVALUATION_SEED, hard=False) for index in range(count)]
    rows = {
        domain: [each for each in ordinary if each.figure.domain == domain]
        for domain in ("scenes", "charts", "documents")
    }
    rows["all"] = ordinary
    for name, split, hard in (("new combinations", "combinations", False), ("hard", "test", True)):
        rows[name] = [sample(split, index, seed=EVALUATION_SEED, hard=hard) for index in range(count // 5)]
    return rows


def contents(split: str, seed: int, count: int) -> Iterable[str]:
    """Yield the contents of the first samples of a split."""
    return (sample(split, index, seed=seed).figure.content for index in range(count))


def widest(samples: Sequence[FigureSample]) -> float:
    """Return how many times as wide a half-width would be, were all answers about one content alike."""
    sizes = Counter(each.figure.content for each in samples).values()
    return math.sqrt(sum(size**2 for size in sizes) / len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=900, help="ordinary questions, as of `evaluate_vqa.py`")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of stage 0's text to look through, from the first row"
    )
    parser.add_argument("--predictions", type=Path, help="answers that `evaluate_vqa.py` kept, of as many questions")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the table in this file, too")
    options = parser.parse_args()
    rows = evaluated(options.count)
    tokenizer_read = {
        content
        for split in ("train", "combinations")
        for content in contents(split, -1, round(options.share * CORPUS_ROWS))
    }
    model_read = {
        content for seed, count in PHASES.items() for content in contents("train", seed, round(options.share * count))
    }
    lines = [
        ["held-out questions", "n", "contents", "in the tokenizer's text", "in the language model's text", "widest"]
    ]
    for name, samples in rows.items():
        found = {each.figure.content for each in samples}
        described = (len(found & tokenizer_read), len(found & model_read))
        lines.append([name, *map(str, (len(samples), len(found), *described)), f"{widest(samples):.2f}"])
    table = markdown(lines)
    print(table)
    figures = {}
    if options.predictions is not None:
        score_of = {made.id: made.score for made in read(options.predictions)}
        shared = [each for each in rows["all"] if each.seed in score_of]
        ratio = clustered_ratio([score_of[each.seed] for each in shared], [each.figure.content for each in shared])
        figures["clustered_ratio"] = round(ratio, 3)
        print(
            f"\nstandard error with contents as clusters: {ratio:.3f} times that of {len(shared)} independent questions"
        )
    if options.results is not None:
        write_results(options.results, {"questions": table}, figures)


if __name__ == "__main__":
    main()
