"""From rows to batches, with the loss on every assistant turn.

TRL supervises one completion a row. A conversation could be cut into one row a turn, which costs its pictures and its
history once a turn; `assistant_only_loss` needs a marked template and, for pictures, transformers 5.18. So this
collator renders a conversation once and supervises each assistant turn in place: what is trained is the same as with
one row a turn, since no token sees a later one.

Collators are nested, each a callable from rows to a batch that calls the one inside it and adds one thing. From the
inside out:

1. `ConversationCollator` makes the padded batch: token ids, mask, labels, and pictures or their stored features.
2. `AnswerWeights` (`siq_vl.training.trainer`) adds the loss weight of each token, from the labels. Stage 3 alone, and
   only where `answer_weight` is not 1.
3. `SourceCollator` (the same module) adds the names of the rows' sources, which the ones inside, TRL's own among them,
   do not know. `SiQVLTrainer` puts it around whatever collator it is given.
4. `PackingCollator` (`siq_vl.data.packing`) takes the padded batch apart and joins its samples to packed rows, names
   and weights with them; so it has to be outermost. The trainer puts it on for its training batches alone: evaluation
   and the counting of lengths see padded batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from siq_vl.data.feature_cache.pictures import encode
from siq_vl.processing_siq_vl import SiQVLProcessor

IGNORED = -100


class Segment(NamedTuple):
    """A piece of a conversation, as the chat template renders it.

    Args:
        text: the piece.
        supervised: whether it is an assistant turn, on which the loss is.
    """

    text: str
    supervised: bool


def supervised_segments(
    processor: SiQVLProcessor, messages: Sequence[Mapping], options: Mapping[str, Any], first: int = 0
) -> list[Segment]:
    """Return a conversation as rendered by the chat template, in pieces, none of them empty.

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
    # Turns are found by where they begin and end in the whole text, not by the template's markers.
    whole = processor.apply_chat_template(list(messages), tokenize=False, **options)
    segments, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        # The turn is what the template adds to the generation prompt; what lies before is context.
        prompt = processor.apply_chat_template(
            list(messages[:index]), tokenize=False, add_generation_prompt=True, **options
        )
        until = whole
        if index + 1 < len(messages):
            until = processor.apply_chat_template(list(messages[: index + 1]), tokenize=False, **options)
        if not until.startswith(prompt) or not whole.startswith(until):
            raise ValueError(
                f"the chat template renders turn {index} otherwise alone than in its conversation: supervising every "
                "turn needs a template that only appends"
            )
        segments.append(Segment(whole[position : len(prompt)], supervised=False))
        segments.append(Segment(until[len(prompt) :], supervised=True))
        position = len(until)
    segments.append(Segment(whole[position:], supervised=False))
    return [segment for segment in segments if segment.text]


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
            rows: the rows, with `images` a list of `RowPicture`s that may be empty and, optionally,
                `chat_template_kwargs`.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)` and, where there are
            pictures, `pixel_values` of shape `(n_images, 3, height, width)`, or, of rows whose pictures are read from
            a feature store, `vision_features` of shape `(n_images, rows, columns, vision_hidden_size)`.

        Raises:
            ValueError: a row is longer than `max_length`, or its pictures do not fit its placeholders.
        """
        images: list = []
        texts: list[str] = []
        segmented: list[list[Segment]] = []
        for row in rows:
            segments = self._segments(row)
            segmented.append(segments)
            images.extend(row["images"])
            texts.extend(segment.text for segment in segments)
        # Segments are tokenized one by one, so that no token lies across the border of a supervised turn.
        encoded, image_inputs = encode(self.processor, images, texts)
        pieces = iter(encoded)
        begin = self.processor.beginning_ids
        ids, labels, masks = [], [], []
        for segments in segmented:
            row_ids: list[int] = []
            row_labels: list[int] = []
            for segment in segments:
                piece = next(pieces)
                row_ids += piece
                row_labels += piece if segment.supervised else [IGNORED] * len(piece)
            if row_ids[: len(begin)] != begin:  # at inference the tokenizer adds it to the rendered text
                row_ids = begin + row_ids
                row_labels = [IGNORED] * len(begin) + row_labels
            if self.max_length is not None and len(row_ids) > self.max_length:
                raise ValueError(
                    f"a row has {len(row_ids)} tokens, more than max_length={self.max_length}: leave it out or raise "
                    "max_length; rows are never cut, since a cut could go through a picture"
                )
            ids.append(row_ids)
            labels.append(row_labels)
            masks.append([1] * len(row_ids))
        return {
            "input_ids": _padded(ids, self.processor.tokenizer.pad_token_id),
            "attention_mask": _padded(masks, 0),
            "labels": _padded(labels, IGNORED),
            **image_inputs,
        }

    def _segments(self, row: Mapping) -> list[Segment]:
        options = row.get("chat_template_kwargs") or {}
        if "messages" in row:
            return supervised_segments(self.processor, row["messages"], options)
        # Turns of the prompt are context, also those of the assistant, as TRL takes them.
        messages = [*row["prompt"], *row["completion"]]
        return supervised_segments(self.processor, messages, options, first=len(row["prompt"]))


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Return rows of unlike lengths as one tensor of shape `(n_rows, longest)`, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
