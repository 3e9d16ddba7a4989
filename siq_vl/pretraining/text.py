"""Pretraining the tiny language model on text: to answer questions about a description, directly or step by step."""

import re
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.charts import MAX_VALUE
from siq_vl.data.figures.figure import Figure, Question
from siq_vl.data.figures.rows import reasoned

TURNS = 4  # questions asked about each description


@dataclass(frozen=True)
class Drill:
    """A kind of drill: about one domain or all, with or without sums."""

    domain: str | None = None
    sums: int = 0


# A plan is what the batches of a phase hold, stretch by stretch: (steps, kind of drill), None for conversations; when it
# ends, conversations go on. One kind of list is where looking up is learnt fastest: drills on all kinds from the start
# had not taught it after three times as long.
Plan = tuple[tuple[int, Drill | None], ...]
TEXT_PLAN: Plan = ((300, Drill("charts")), (300, Drill()), (300, Drill(sums=8)))
CAPTIONS_PLAN: Plan = ((700, None), (300, Drill()), (200, Drill("documents")), (300, Drill("scenes")), (150, Drill()))
MIXED_IN = Drill(sums=8)  # the drills among the conversations
DRILL_SHARE = 0.2  # their share
STEP_BY_STEP = "Think step by step."
READ_FIRST = "Read everything, then think step by step."


def language_model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Return the tiny Qwen2's configuration: hidden size 192, 4 layers, tied embeddings."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_theta=100.0,  # contexts are short: with 10,000 too few of 16 frequencies tell neighbours apart to learn look-ups
        tie_word_embeddings=True,
        initializer_range=0.06,  # near 1 / sqrt(hidden_size): at 0.02, attention of this width starts almost uniform
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def question_and_response(figure: Figure, question: Question, rng: Random) -> tuple[str, str]:
    """Return a user turn and its response: direct, step by step, or read first and then step by step."""
    way = rng.choice(("direct", "steps", "read"))
    if way == "direct":
        return question.text, question.answer
    style, instruction = ("terse", STEP_BY_STEP) if way == "steps" else ("structured", READ_FIRST)
    return f"{question.text} {instruction}", reasoned(figures.rationale(figure, question, style), question.answer)


def conversation(split: str, index: int, seed: int) -> list[tuple[str, str]]:
    """Return `TURNS` (user, assistant) turns about one described figure."""
    sample = figures.sample(split, index, seed=seed)
    rng = Random(f"{sample.seed}/text")
    questions = sample.figure.questions(rng)
    asked = [rng.choice(questions) for _ in range(TURNS)]
    turns = [question_and_response(sample.figure, question, rng) for question in asked]
    (first, response), *rest = turns
    return [(f"{sample.figure.caption}\n{first}", response), *rest]


def drill(split: str, index: int, seed: int, kind: Drill) -> str:
    """Return text with nothing but look-ups and sums: a description, its facts restated at random, then arithmetic.

    It teaches, many times a line, what every question needs: the value that stands after a key.
    """
    sample = figures.sample(split, index, seed=seed, domain=kind.domain)
    rng = Random(f"{sample.seed}/drill")
    facts = [" ".join(fact) for fact in sample.figure.facts]
    restated = [rng.choice(facts) for _ in range(14)]
    return f"{sample.figure.caption}. " + ". ".join([*restated, *(_arithmetic(rng) for _ in range(kind.sums))])


def _arithmetic(rng: Random) -> str:
    a, b = rng.sample(range(1, MAX_VALUE + 1), 2)
    more, less = max(a, b), min(a, b)
    return rng.choice((f"{a} + {b} = {a + b}", f"{more} - {less} = {more - less}", f"{more} > {less}"))


def encode_drill(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a drill: all but its description is supervised."""
    description, _, rest = text.partition(". ")
    ids, restated = tokenizer(f"{description}.")["input_ids"], tokenizer(rest)["input_ids"]
    return ids + restated, [-100] * len(ids) + restated


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Return token ids in ChatML and labels that cover each response with its `<|im_end|>`, -100 elsewhere."""
    ids, labels = [], []
    for user, assistant in turns:
        prompt = tokenizer(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        response = tokenizer(f"{assistant}<|im_end|>")["input_ids"]
        newline = tokenizer("\n")["input_ids"]
        ids += prompt + response + newline
        labels += [-100] * len(prompt) + response + [-100] * len(newline)
    return ids, labels


def pad(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad to tensors `input_ids`, `labels` and `attention_mask`, each (rows, longest)."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
    }


class TextBatches:
    """Batches by training step: the stretches of a plan, then conversations with some drills among them.

    Four steps' rows are sorted by length together, to pad little.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, seed: int, plan: Plan = ()) -> None:
        self._tokenizer, self._size, self._seed = tokenizer, size, seed
        self._plan = plan
        self._bucket_at = lru_cache(maxsize=1)(self._bucket)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        bucket, part = divmod(step, 4)
        rows = self._bucket_at(bucket)
        start = part * self._size
        return pad(rows[start : start + self._size], self._tokenizer.pad_token_id)

    def _bucket(self, bucket: int) -> list[tuple[list[int], list[int]]]:
        count = 4 * self._size
        rows = sorted((self._row(bucket * count + offset) for offset in range(count)), key=lambda row: len(row[0]))
        parts = [rows[start : start + self._size] for start in range(0, count, self._size)]
        Random(f"{self._seed}/{bucket}").shuffle(parts)
        return [row for part in parts for row in part]

    def _row(self, index: int) -> tuple[list[int], list[int]]:
        kind = self._planned(index)
        if kind is None and index % round(1 / DRILL_SHARE) == 0:
            kind = MIXED_IN
        if kind is None:
            return encode(self._tokenizer, conversation("train", index, self._seed))
        return encode_drill(self._tokenizer, drill("train", index, self._seed, kind))

    def _planned(self, index: int) -> Drill | None:
        end = 0
        for steps, kind in self._plan:
            end += steps * self._size
            if index < end:
                return kind
        return None


def corpus(rows: int = 40_000) -> list[str]:
    """Return the text that the tokenizer is trained on."""
    texts = [
        f"user\n{figures.CAPTION_PROMPT}\nassistant\n{number} = {number}" for number in range(100) for _ in range(20)
    ]
    for split in ("train", "combinations"):  # a language model knows the words of combinations it never sees drawn
        for index in range(rows // 2):
            for user, assistant in conversation(split, index, seed=-1):
                texts += [user, re.sub("</?(think|answer)>", "\n", assistant)]
    return texts


def language_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a tiny Qwen2 with random weights."""
    return Qwen2ForCausalLM(language_model_config(tokenizer))
