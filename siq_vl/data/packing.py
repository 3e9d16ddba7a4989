"""Packing: several samples in one row of tokens, none of which sees another.

TRL packs text alone, before training, and a step then takes so many packed rows. Here the samples of an optimizer step
stay what they are without packing, and so do its loss, its gradients, the length of an epoch and what a resumed run
reads next: only the forward passes change. The samples that a device takes at once are dealt out, first-fit decreasing,
to rows of at most so many tokens, each of which is one forward and backward pass without any padding. So rows may be
read lazily, in loader workers, or from a stream; their lengths are known once they are encoded.

The fallback is padding in batches of rows of like length. It needs every row's length beforehand, and changes which
rows meet in a step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.trainer_pt_utils import get_length_grouped_indices

from siq_vl.data.collation import IGNORED

IMAGE_TENSORS = ("pixel_values", "vision_features")  # their first dimension counts the batch's images
ATTENTION = ("sdpa", "eager", "flex_attention")  # keep samples apart by the restarting positions alone
FLASH = ("flash_attention_2", "flash_attention_3")  # are given the bounds of the samples, too
SDPA_BY_SAMPLE = "sdpa_by_sample"


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return which samples share a row: lists of indices, each ascending, with at most `budget` tokens a row.

    A sample of more than `budget` tokens has a row of its own: nothing is cut or left out.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((row for row, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(budget)
        rows[place].append(index)
        room[place] -= lengths[index]
    return [sorted(row) for row in rows]


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Return the share of a padded batch's positions that are padding, over batches of `batch_size` in this order."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def fill(lengths: Sequence[int], budget: int, batch_size: int) -> float:
    """Return how full packed rows are, as a share of `budget`, where `batch_size` samples are packed together."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    rows = sum(len(first_fit_decreasing(batch, budget)) for batch in batches)
    return sum(lengths) / (rows * budget)


class PackedRows:
    """The packed rows of one batch, each the inputs of one forward pass.

    By a tensor's name it gives that of all rows in one, of shape `(1, n_tokens)`, which is what the trainer counts
    tokens on. It is no mapping or list, so that what moves batches to a device leaves it where it is: rows follow one
    by one.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __contains__(self, name: str) -> bool:
        return name in self.rows[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.cat([row[name] for row in self.rows], dim=1)


@dataclass
class PackingCollator:
    """Any collator of padded batches, with its batches packed.

    Args:
        collate: makes `input_ids`, `attention_mask`, `labels` and any further tensors of shape `(batch_size,
            sequence_length)`; images of the whole batch, in the order of its samples; and lists of one entry a sample.
        budget: the most tokens of a row that holds more than one sample.
        image_token_id: the placeholder, by which a sample's images are found.
        attention: what the language model attends with; `sdpa_by_sample` and flash attention are given what they need
            to know of the samples' lengths.
    """

    collate: Callable[[Sequence[Mapping]], dict[str, Any]]
    budget: int
    image_token_id: int
    attention: str = "sdpa"

    def __call__(self, samples: Sequence[Mapping]) -> PackedRows:
        """Return the samples as packed rows.

        Each row has `input_ids`, `labels`, `position_ids` that restart with each sample, and whatever else the collator
        made a token, all of shape `(1, n_tokens)`, and no `attention_mask`. The first label of each sample is ignored:
        it would be predicted from the sample before.

        Raises:
            ValueError: the collator made a tensor that belongs neither to tokens nor to images, or its own check fails.
        """
        batch = self.collate(samples)
        mask = batch.pop("attention_mask").bool()
        images = self._images(batch)
        parts = []
        for index, visible in enumerate(mask):
            part = {name: self._own(name, value, index, visible) for name, value in batch.items()}
            part["labels"][0] = IGNORED
            part["position_ids"] = torch.arange(len(part["input_ids"]))
            parts.append(part)
        rows = first_fit_decreasing([len(part["input_ids"]) for part in parts], self.budget)
        return PackedRows(
            self._join([parts[index] for index in row], [images[index] for index in row if index in images])
            for row in rows
        )

    def _images(self, batch: dict[str, Any]) -> dict[int, dict[str, torch.Tensor]]:
        """Take the images out of a batch; return each sample's own, of the samples that have some."""
        found = {name: batch.pop(name) for name in IMAGE_TENSORS if name in batch}
        if not found:
            return {}
        tokens = (batch["input_ids"] == self.image_token_id).sum(dim=1)
        count = len(next(iter(found.values())))
        per_image = int(tokens.sum()) // count
        counts = (tokens // per_image).tolist()
        if (tokens % per_image).any() or sum(counts) != count:
            raise ValueError(
                f"{count} images for {tokens.tolist()} placeholders a sample: images of one batch must have equally many"
            )
        split = {name: value.split(counts) for name, value in found.items()}
        return {i: {name: parts[i] for name, parts in split.items()} for i, own in enumerate(counts) if own}

    def _own(self, name: str, value: Any, index: int, visible: torch.Tensor) -> Any:
        """Return a sample's own part of what the collator made for a batch."""
        if isinstance(value, torch.Tensor) and value.shape == (len(value), len(visible)):
            return value[index][visible].clone()
        if isinstance(value, list):
            return value[index]
        raise ValueError(
            f"{name} cannot be packed: a batch holds tensors of shape (batch_size, sequence_length), lists of one entry "
            f"a sample, and {' or '.join(IMAGE_TENSORS)}"
        )

    def _join(self, parts: Sequence[dict[str, Any]], images: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Return one row of several samples, as the model takes it."""
        row: dict[str, Any] = {"use_cache": False}
        for name, value in parts[0].items():
            own = [part[name] for part in parts]
            row[name] = torch.cat(own).unsqueeze(0) if isinstance(value, torch.Tensor) else own
        for name in images[0] if images else ():
            row[name] = torch.cat([each[name] for each in images])
        lengths = [len(part["input_ids"]) for part in parts]
        if self.attention == SDPA_BY_SAMPLE:
            row["sample_lengths"] = lengths
        if self.attention in FLASH:
            starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            row |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            row |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return row


def check_attention(implementation: str) -> None:
    """Refuse an attention implementation under which packed samples might see each other.

    Raises:
        ValueError: it is not known to keep them apart.
    """
    if implementation not in (*ATTENTION, *FLASH):
        raise ValueError(
            f"attn_implementation is {implementation!r}, which is not known to keep packed samples apart: use "
            f"{', '.join((*ATTENTION, *FLASH))}, or batching: padded"
        )


def _sdpa_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' sdpa does, in each sample of a packed row on its own.

    With a mask for the whole row, sdpa would also compute what the mask then hides: for many samples most of it.

    Args:
        module: the attention layer.
        query: of shape `(1, n_heads, n_tokens, head_dim)`; key and value alike, with their own number of heads.
        key: see query.
        value: see query.
        attention_mask: for rows that are not packed, and for samples longer than the layer's sliding window.
        sample_lengths: of the samples of a packed row.
        kwargs: for sdpa.

    Returns:
        A tensor of shape `(1, n_tokens, n_heads, head_dim)`, and None.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = zip(*(tensor.split(list(sample_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    # A sample as long as a sliding window, or longer, needs its own square of the mask; others are causal throughout.
    window = kwargs.get("sliding_window")
    outputs, start = [], 0
    for length, part in zip(sample_lengths, parts, strict=True):
        square = None
        if window is not None and length >= window and attention_mask is not None:
            square = attention_mask[..., start : start + length, start : start + length]
        outputs.append(sdpa_attention_forward(module, *part, square, **kwargs)[0])
        start += length
    return torch.cat(outputs, dim=1), None


@contextmanager
def attend_by_sample(config: PretrainedConfig) -> Iterator[None]:
    """Let a language model, whose own configuration is given, attend with `sdpa_by_sample` for a while."""
    AttentionInterface.register(SDPA_BY_SAMPLE, _sdpa_by_sample)
    AttentionMaskInterface.register(SDPA_BY_SAMPLE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = config._attn_implementation
    config._attn_implementation = SDPA_BY_SAMPLE
    try:
        yield
    finally:
        config._attn_implementation = before


def row_lengths(rows: Dataset, collate: Callable[[Sequence[Mapping]], dict[str, Any]], workers: int = 0) -> list[int]:
    """Return how many tokens each row has; every row is read once for it, its pictures included.

    Args:
        rows: rows that any can be read of.
        collate: makes a padded batch of them.
        workers: processes that read.

    Raises:
        ValueError: the rows are a stream.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(
            "batching is length_grouped, but a stream's lengths are not known before it is read: use batching: packed"
        )
    loader = DataLoader(rows, batch_size=16, num_workers=workers, collate_fn=partial(_lengths, collate))
    return [length for part in tqdm(loader, desc="counting tokens", disable=None) for length in part]


def _lengths(collate: Callable, samples: Sequence[Mapping]) -> list[int]:
    return collate(samples)["attention_mask"].sum(dim=1).tolist()


class LengthGroupedSampler(Sampler[int]):
    """transformers' order of rows of like length, which depends on seed and epoch alone, so that a resumed run has it.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch; the trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
