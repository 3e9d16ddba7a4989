"""How likely a model finds the reference answers: the average loss of the report's section A.6."""

from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from siq_vl.data.collation import IGNORED, ConversationCollator
from siq_vl.data.conversations import Dropped
from siq_vl.data.figures.rows import assistant_turn, reasoned
from siq_vl.evaluation.items import Item
from siq_vl.processing_siq_vl import SiQVLProcessor


def reference_losses(
    model: PreTrainedModel,
    processor: SiQVLProcessor,
    items: Sequence[Item],
    *,
    traces: bool,
    blind: bool = False,
    template_options: Mapping[str, object] | None = None,
    batch_size: int = 32,
    progress: str | None = None,
) -> dict[str, float]:
    """Return by question the mean cross-entropy, in nats a token, of its reference output, end of turn included.

    Args:
        model: a SiQ-VL model, in evaluation mode.
        processor: its processor.
        items: the questions; those without a gold answer, without a rationale where `traces` is set, or whose pictures
            cannot be read, are left out.
        traces: whether the reference is `<think>rationale</think><answer>answer</answer>`, or the first gold answer alone.
        blind: withhold every picture.
        template_options: given to the chat template, over those of the question.
        batch_size: questions read together.
        progress: what the progress bar says; no bar by default.
    """
    # The collator of training: the same tokens count, and the same end of turn.
    collate = ConversationCollator(processor)
    usable = []
    for item in items:
        if item.answer and not item.fault and (item.reasoning or not traces):
            usable.append(item)
    # Questions of like length share a batch, so that little of it is padding.
    usable.sort(key=lambda item: (len(item.images), len(item.question) + len(item.reasoning)))
    losses: dict[str, float] = {}
    for start in tqdm(range(0, len(usable), batch_size), desc=progress, disable=progress is None):
        rows = {}
        for item in usable[start : start + batch_size]:
            try:
                images = [] if blind else item.open_images()
            except Dropped:
                continue  # counted where the question is asked
            reference = reasoned(item.reasoning, item.answer) if traces else item.answer
            options = {**item.template_options, **(template_options or {})}
            turns = {"prompt": item.prompt(blind), "completion": assistant_turn(reference)}
            rows[item.id] = {"images": images, **turns, "chat_template_kwargs": options}
        if rows:
            losses.update(zip(rows, _losses(model, collate(list(rows.values()))), strict=True))
    return losses


def _losses(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> list[float]:
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    # What is put out at a position is the next one's token.
    labels = batch["labels"].to(model.device)[:, 1:]
    with torch.no_grad():  # under FSDP2 and ZeRO-3 the weights gathered here are trained on later
        logits = model(**inputs).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )  # (batch_size, sequence_length - 1)
    return (each.sum(1) / (labels != IGNORED).sum(1)).tolist()
