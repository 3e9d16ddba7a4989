"""From rows to batches, with the loss on every assistant turn.

TRL supervises one completion a row. A conversation could be cut into one row a turn, which costs its pictures and its
history once a turn; `assistant_only_loss` needs a marked template and, for pictures, transformers 5.18. So this
collator renders a conversation once and supervises each assistant turn in place: what is trained is the same as with
one row a turn, since no token sees a later one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from siq_vl.data.feature_cache.pictures import encode
from siq_vl.processing_siq_vl import SiQVLProcessor

IGNORED = -100


def supervised_segments(
    processor: SiQVLProcessor, messages: Sequence[Mapping], options: Mapping[str, Any], first: int = 0
) -> list[tuple[str, bool]]:
    """Return a conversation as rendered by the chat template, in pieces (text, supervised).

    A supervised piece is an assistant turn: its text and its end-of-turn token, as the model will write them after the
    generation prompt.

    Args:
        processor: has the chat template.
        messages: the conversation.
        options: given to the chat template.
        first: messages before this one are context, never supervised.

    Raises:
        ValueError: the template writes an assistant turn otherwise than it prompts for it, or rewrites earlier turns.
    """
    whole = processor.apply_chat_template(list(messages), tokenize=False, **options)
    segments, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        prompt = processor.apply_chat_template(
            list(messages[:index]), tokenize=False, add_generation_prompt=True, **options
        )
        until = processor.apply_chat_template(list(messages[: index + 1]), tokenize=False, **options)
        if not until.startswith(prompt) or not whole.startswith(until):
            raise ValueError(
                f"the chat template renders turn {index} otherwise alone than in its conversation: supervising every "
                "turn needs a template that only appends"
            )
        segments += [(whole[position : len(prompt)], False), (until[len(prompt) :], True)]
        position = len(until)
    return [segment for segment in (*segments, (whole[position:], False)) if segment[0]]


@dataclass
class ConversationCollator:
    """Makes batches of rows with `images` and either `messages`, or `prompt` and `completion`.

    Every assistant turn of `messages` is supervised, of the other form only the completion; each with its end-of-turn
    token, and nothing else. On rows of one turn the batch is that of TRL's own collator. Rows are padded on the right.

    Args:
        processor: renders, tokenizes, prepares pictures.
        max_length: longest row, in tokens; a longer one is refused, never cut.
    """

    processor: SiQVLProcessor
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Return a batch.

        Args:
            rows: the rows, with `images` a list that may be empty and, optionally, `chat_template_kwargs`.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)` and, where there are
            pictures, `pixel_values` of shape `(n_images, 3, height, width)`, or, of rows whose pictures are read from
            a feature store, `vision_features` of shape `(n_images, rows, columns, vision_hidden_size)`.

        Raises:
            ValueError: a row is longer than `max_length`, or its pictures do not fit its placeholders.
        """
        segmented = [self._segments(row) for row in rows]
        images = [image for row in rows for image in row["images"]]
        texts = [text for segments in segmented for text, _ in segments]
        encoded, image_inputs = encode(self.processor, images, texts)
        pieces, begin = iter(encoded), self.processor.beginning_ids
        ids, labels = [], []
        for segments in segmented:
            row_ids: list[int] = []
            row_labels: list[int] = []
            for _, supervised in segments:
                piece = next(pieces)
                row_ids += piece
                row_labels += piece if supervised else [IGNORED] * len(piece)
            if row_ids[: len(begin)] != begin:  # at inference the tokenizer adds it to the rendered text
                row_ids, row_labels = begin + row_ids, [IGNORED] * len(begin) + row_labels
            if self.max_length is not None and len(row_ids) > self.max_length:
                raise ValueError(
                    f"a row has {len(row_ids)} tokens, more than max_length={self.max_length}: leave it out or raise "
                    "max_length; rows are never cut, since a cut could go through a picture"
                )
            ids.append(row_ids)
            labels.append(row_labels)
        masks = [[1] * len(row_ids) for row_ids in ids]
        return {
            "input_ids": _padded(ids, self.processor.tokenizer.pad_token_id),
            "attention_mask": _padded(masks, 0),
            "labels": _padded(labels, IGNORED),
            **image_inputs,
        }

    def _segments(self, row: Mapping) -> list[tuple[str, bool]]:
        options = row.get("chat_template_kwargs") or {}
        if "messages" in row:
            return supervised_segments(self.processor, row["messages"], options)
        messages = [*row["prompt"], *row["completion"]]
        return supervised_segments(self.processor, messages, options, first=len(row["prompt"]))


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
