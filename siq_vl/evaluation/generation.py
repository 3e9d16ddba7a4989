"""Batched greedy generation with any image-text-to-text model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, ProcessorMixin

from siq_vl.generation_siq_vl import ThinkingBudgetLogitsProcessor


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
        for index, text in zip(batch, made, strict=True):
            completions[index] = text
    return completions


def rendered(processor: ProcessorMixin, prompt: Sequence[Mapping], options: Mapping[str, Any]) -> str:
    """Return a conversation as the text that the model completes."""
    return processor.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False, **options)


def batches_by_length(texts: Sequence[str], images: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of rows that are generated together: like in number of images, then in length, shortest first."""
    order = sorted(range(len(texts)), key=lambda place: (images[place], len(texts[place]), place))
    yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def complete(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    *,
    max_new_tokens: int,
    max_thinking_tokens: int | None = None,
) -> list[str]:
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
    length = inputs["input_ids"].shape[1]
    bounds = LogitsProcessorList()
    if max_thinking_tokens is not None:  # any model's generate takes it in this form
        budget = ThinkingBudgetLogitsProcessor(processor.tokenizer, max_thinking_tokens)
        bounds.append(budget.start(length, length + max_new_tokens, model.generation_config.eos_token_id))
    with torch.no_grad():  # under FSDP2 and ZeRO-3 the weights gathered here are trained on later
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=bounds)
    return processor.batch_decode(output[:, length:], skip_special_tokens=True)
