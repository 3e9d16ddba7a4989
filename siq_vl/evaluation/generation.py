"""Batched greedy generation with any image-text-to-text model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from siq_vl.generation_siq_vl import ThinkingBudgetLogitsProcessor

# Room for a rationale and an answer, where nothing is known of a model's own.
GENEROUS_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Completion:
    """What a model put out.

    Args:
        text: the output, special tokens left out.
        cut_off: whether the bound on new tokens ended it, and not the model.
    """

    text: str
    cut_off: bool


def fitting_new_tokens(checkpoint: str) -> int:
    """Return a bound on new tokens that cuts off nothing that a checkpoint was taught to put out.

    No row that it was trained on was longer than the `max_length` of its `training_settings.json`, its picture and its
    question included. Other models get `GENEROUS_NEW_TOKENS`.

    Args:
        checkpoint: a folder, or an id on the Hub.
    """
    try:
        file = cached_file(checkpoint, "training_settings.json")
    except OSError:  # it has none
        file = None
    if file is None:
        return GENEROUS_NEW_TOKENS
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    return settings.get("training", {}).get("max_length") or GENEROUS_NEW_TOKENS


def generate_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[list[dict]],
    images: Sequence[list[Image.Image]],
    *,
    max_new_tokens: int = 128,
    max_thinking_tokens: int | None = None,
    batch_size: int = 64,
    progress: str | None = None,
    **template_options,
) -> list[str]:
    """Return one greedy completion a prompt, special tokens left out, in the prompts' order.

    Args:
        model: an image-text-to-text model, in evaluation mode.
        processor: its processor.
        prompts: conversations that end with a user turn.
        images: the pictures of each conversation, possibly none.
        max_new_tokens: bound on the completion.
        max_thinking_tokens: bound on its rationale, after which an answer is asked for; none by default.
        batch_size: rows generated together; rows of like length share a batch, padded on the left.
        progress: what the progress bar says; no bar by default.
        template_options: passed to the chat template, for instance `enable_thinking=False`.
    """
    texts = [rendered(processor, prompt, template_options) for prompt in prompts]
    completions = [""] * len(texts)
    batches = list(batches_by_length(texts, [len(pictures) for pictures in images], batch_size))
    for batch in tqdm(batches, desc=progress, disable=progress is None):
        made = complete(
            model,
            processor,
            [texts[index] for index in batch],
            [images[index] for index in batch],
            max_new_tokens=max_new_tokens,
            max_thinking_tokens=max_thinking_tokens,
        )
        for index, completion in zip(batch, made, strict=True):
            completions[index] = completion.text
    return completions


def rendered(processor: ProcessorMixin, prompt: Sequence[Mapping], options: Mapping[str, Any]) -> str:
    """Return a conversation as the text that the model completes."""
    return processor.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False, **options)


def batches_by_length(texts: Sequence[str], images: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of rows that are generated together: like in number of images, then in length, shortest first."""
    # A batch is padded to its longest row, and pictures cost more tokens than words.
    order = sorted(range(len(texts)), key=lambda place: (images[place], len(texts[place]), place))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def complete(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    *,
    max_new_tokens: int,
    max_thinking_tokens: int | None = None,
) -> list[Completion]:
    """Return the greedy completions of rendered texts, one batch, padded on the left.

    Args:
        texts: what `rendered` made of the conversations.
        images: the pictures of each.
        max_new_tokens: bound on the completion.
        max_thinking_tokens: bound on its rationale, after which an answer is asked for; none by default.

    Raises:
        ValueError: `max_new_tokens` leaves no room for an answer after the rationale.
    """
    start = processor.tokenizer.bos_token
    inputs = processor(
        images=[list(pictures) for pictures in images] if any(images) else None,
        text=list(texts),
        padding=True,
        padding_side="left",
        # A template that writes the first token itself has it already.
        add_special_tokens=start is not None and not texts[0].startswith(start),
        return_tensors="pt",
    ).to(model.device, model.dtype)
    # Padding is on the left, so that all outputs begin at one place.
    length = inputs["input_ids"].shape[1]
    bounds = LogitsProcessorList()
    if max_thinking_tokens is not None:  # any model's generate takes it in this form
        budget = ThinkingBudgetLogitsProcessor(processor.tokenizer, max_thinking_tokens)
        bounds.append(budget.start(length, length + max_new_tokens, model.generation_config.eos_token_id))
    with torch.no_grad():  # under FSDP2 and ZeRO-3 the weights gathered here are trained on later
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=bounds)
    new_tokens = output[:, length:]
    # A model that ends its turn writes an end token, after which there is only padding.
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=new_tokens.device).flatten()
    ended = torch.isin(new_tokens, ends).any(dim=1).tolist()
    texts = processor.batch_decode(new_tokens, skip_special_tokens=True)
    return [Completion(text, cut_off=not end) for text, end in zip(texts, ended, strict=True)]
