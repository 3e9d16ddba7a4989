"""Batched greedy generation."""

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)


def generate_texts(
    model: PreTrainedModel,
    processor: SiQVLProcessor,
    prompts: Sequence[list[dict]],
    images: Sequence[list[Image.Image]],
    *,
    max_new_tokens: int = 128,
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
        batch_size: rows generated together; rows of like length share a batch, padded on the left.
        progress: what the progress bar says; no bar by default.
        template_options: passed to the chat template, for instance `enable_thinking=False`.
    """
    texts = [
        processor.apply_chat_template(prompt, add_generation_prompt=True, **template_options) for prompt in prompts
    ]
    order = sorted(range(len(texts)), key=lambda index: (len(images[index]), len(texts[index])))
    completions = [""] * len(texts)
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None):
        batch = order[start : start + batch_size]
        pictures = [picture for index in batch for picture in images[index]]
        inputs = processor(
            images=pictures or None,
            text=[texts[index] for index in batch],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        decoded = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, decoded, strict=True):
            completions[index] = text
    return completions
