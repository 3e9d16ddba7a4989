"""Held-out questions and captions about drawn figures, and the answers that need no model."""

from collections import Counter, defaultdict
from dataclasses import replace

from siq_vl.data.figures.dataset import DOMAINS, rationale, sample
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.items import Item

EVALUATION_SEED = 0
# The ordinary test split; combinations never trained on; axis reading and sums of three or more terms, reported only.
GROUPS = ("held out", "combinations", "hard")


def held_out_items(count: int, seed: int = EVALUATION_SEED) -> list[Item]:
    """Return `count` ordinary questions, and a fifth as many of each of the other groups."""
    items = [_item("held out", "test", index, seed, hard=False) for index in range(count)]
    items += [_item("combinations", "combinations", index, seed, hard=False) for index in range(count // 5)]
    items += [_item("hard", "test", index, seed, hard=True) for index in range(count // 5)]
    return items


def _item(group: str, split: str, index: int, seed: int, hard: bool) -> Item:
    # Receipts and plates have no held-out combinations, so of the documents only signs appear in that group.
    drawn = sample(split, index, seed=seed, hard=hard)
    question, figure = drawn.question, drawn.figure
    return Item(
        id=drawn.seed + ("/hard" if hard else ""),
        group=group,
        domain=figure.domain,
        type=question.type,
        multi_step=question.multi_step,
        question=question.text,
        golds=(question.answer,),
        messages=user_turn(question.text),
        images=(drawn.image,),
        caption=figure.caption,
        reasoning=rationale(figure, question),
    )


def described(item: Item) -> Item:
    """Return a question about a drawn figure with its caption in place of the picture, as text-only students are asked."""
    return replace(item, images=(), messages=user_turn(f"{item.caption}\n{item.question}", images=0))


def majority_answers(per_domain: int = 3000) -> dict[tuple[str, str], str]:
    """Return the commonest training answer by (domain, question type): the baseline that sees neither picture nor words."""
    # A seed of its own: neither the rows that train nor those that are asked.
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for domain in DOMAINS:
        for index in range(per_domain):
            drawn = sample("train", index, seed=-2, domain=domain)
            counts[domain, drawn.question.type][drawn.question.answer] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
