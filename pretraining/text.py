"""Pretraining the tiny language model on text: to answer questions about a description, directly or step by step."""

import re
from functools import lru_cache
from random import Random

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.charts import MAX_VALUE
from siq_vl.data.figures.figure import Figure, Question, verdict
from siq_vl.data.figures.lexicon import WORDS
from siq_vl.data.figures.rows import CAPTION_PROMPTS, reasoned
from siq_vl.pretraining.initialization import begin_with_look_ups

LOOK_UP_STEPS = 400  # of phase `text`: its first steps hold nothing but look-ups
CALCULATION_STEPS = 400  # of phase `captions`: the text of its first steps is nothing but calculations
CALCULATION_SHARE = 0.2  # of the rows that follow, between the conversations
STEP_BY_STEP = "Think step by step."
READ_FIRST = "Read everything, then think step by step."

# Text in pieces, each with whether it is to be learnt.
Pieces = list[tuple[str, bool]]


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
        tie_word_embeddings=True,
        initializer_range=0.06,  # near 1 / sqrt(hidden_size)
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


def conversation(split: str, index: int, seed: int) -> tuple[str, str]:
    """Return a user turn, a description and a question about it, and its response."""
    sample = figures.sample(split, index, seed=seed)
    rng = Random(f"{sample.seed}/text")
    question, response = question_and_response(sample.figure, rng.choice(sample.figure.questions(rng)), rng)
    return f"{sample.figure.caption}\n{question}", response


def turn(user: str, assistant: str) -> Pieces:
    """Return a user turn and its response in ChatML; the response and its `<|im_end|>` are to be learnt."""
    return [(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", False), (f"{assistant}<|im_end|>", True)]


def look_up_drill(split: str, index: int, seed: int) -> Pieces:
    """Return a list of random pairs, and ten times the word that belongs to a known one.

    Any word of the lexicon goes with any other, so that looking up is learnt for all of them, and for pairs that no
    picture ever shows. A row asks for what follows a word, or for what stands before it.
    """
    rng = Random(f"{split}/{seed}/look up/{index}")
    words = iter(rng.sample(WORDS, 12))
    pairs = list(zip(words, words, strict=True))[: rng.randint(2, 6)]
    backwards = rng.random() < 0.5
    pieces = [(f"pairs: {', '.join(map(' '.join, pairs))}.", False)]
    for _ in range(10):
        pair = rng.choice(pairs)
        known, found = reversed(pair) if backwards else pair
        pieces += [(known, False), (f"{found}.", True)]
    return pieces


def calculation_drill(split: str, index: int, seed: int) -> Pieces:
    """Return 16 calculations and comparisons as rationales write them, mostly sums and differences."""
    rng = Random(f"{split}/{seed}/calculate/{index}")
    return [piece for _ in range(16) for piece in _calculation(rng)]


def _calculation(rng: Random) -> Pieces:
    a, b = rng.sample(range(1, MAX_VALUE + 1), 2)
    kind = rng.choice(("sum", "sum", "sum", "difference", "difference", "order", "digits", "verdict"))
    if kind == "sum":
        return [(f"{a} + {b} =", False), (f"{a + b}.", True)]
    if kind == "difference":
        return [(f"{max(a, b)} - {min(a, b)} =", False), (f"{abs(a - b)}.", True)]
    if kind == "order":
        return [(f"{a}. {b}. {a}", False), (f"{'>' if a > b else '<'} {b}.", True)]
    if kind == "digits":
        tens, ones = divmod(rng.randint(10, 99), 10)
        return [(f"{tens}{ones} is", False), (f"{tens} {ones}.", True)]
    word, other = rng.sample(WORDS, 2)
    *asked, answer = verdict(word, rng.choice((word, other))).split()
    return [(" ".join(asked), False), (f"{answer}.", True)]


def encode(tokenizer: PreTrainedTokenizerFast, pieces: Pieces) -> tuple[list[int], list[int]]:
    """Return token ids, and labels that cover the pieces to be learnt, -100 elsewhere."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces:
        tokens = tokenizer(text)["input_ids"]
        ids += tokens
        labels += tokens if learnt else [-100] * len(tokens)
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
    """Batches by training step: look-ups alone, calculations alone, then conversations with some calculations.

    Four steps' rows are sorted by length together, to pad little. A subclass may tell of another world.
    """

    look_up_drill = staticmethod(look_up_drill)
    calculation_drill = staticmethod(calculation_drill)
    conversation = staticmethod(conversation)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        size: int,
        seed: int,
        look_up_steps: int = 0,
        calculation_steps: int = 0,
    ) -> None:
        self._tokenizer, self._size, self._seed = tokenizer, size, seed
        self._look_ups = look_up_steps * size
        self._calculations = calculation_steps * size
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

    def _kind(self, index: int) -> str:
        if index < self._look_ups:
            return "look up"
        if index < self._look_ups + self._calculations or index % round(1 / CALCULATION_SHARE) == 0:
            return "calculation"
        return "conversation"

    def _row(self, index: int) -> tuple[list[int], list[int]]:
        kind = self._kind(index)
        if kind == "look up":
            return encode(self._tokenizer, self.look_up_drill("train", index, self._seed))
        if kind == "calculation":
            return encode(self._tokenizer, self.calculation_drill("train", index, self._seed))
        return encode(self._tokenizer, turn(*self.conversation("train", index, self._seed)))


def corpus(rows: int = 80_000) -> list[str]:
    """Return the text that the tokenizer is trained on."""
    texts = ["user\nassistant\n" for _ in range(20)]
    for index in range(rows // 8):
        for drill in (look_up_drill, calculation_drill):
            texts.append(" ".join(text for text, _ in drill("train", index, seed=-1)))
    for split in ("train", "combinations"):  # a language model knows the words of combinations it never sees drawn
        for index in range(rows // 2):
            user, assistant = conversation(split, index, seed=-1)
            texts += [user, re.sub("</?(think|answer)>", "\n", assistant)]
    return [*texts, *CAPTION_PROMPTS * 20]


def language_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a tiny Qwen2 before its training: random weights, but for the look-ups that it begins with."""
    return begin_with_look_ups(Qwen2ForCausalLM(language_model_config(tokenizer)))
