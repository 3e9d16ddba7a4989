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
_COUNTED_ROWS = 16  # that are collated at once to count their tokens


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return which samples share a row: lists of indices, each ascending, with at most `budget` tokens a row.

    A sample of more than `budget` tokens has a row of its own: nothing is cut or left out.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # tokens that still fit each row
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = 0
        while row < len(rows) and lengths[index] > room[row]:
            row += 1
        if row == len(rows):  # it fits none: a new one is begun
            rows.append([])
            room.append(budget)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(lengths), batch_size):
        yield lengths[start : start + batch_size]


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Return the share of a padded batch's positions that are padding, over batches of `batch_size` in this order."""
    positions = sum(len(batch) * max(batch) for batch in _batches(lengths, batch_size))
    return 1 - sum(lengths) / positions


def fill(lengths: Sequence[int], budget: int, batch_size: int) -> float:
    """Return how full packed rows are, as a share of `budget`, where `batch_size` samples are packed together."""
    rows = sum(len(first_fit_decreasing(batch, budget)) for batch in _batches(lengths, batch_size))
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
class _Sample:
    """One sample of a padded batch, its padding gone.

    Args:
        tokens: tensors of shape `(n_tokens,)`, by name.
        listed: what the collator lists for each sample, by name, such as its source.
        images: tensors of the sample's own images, by name; none where it has no image.
    """

    tokens: dict[str, torch.Tensor]
    listed: dict[str, Any]
    images: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])


@dataclass
class PackingCollator:
    """Any collator of padded batches, with its batches packed. See `siq_vl.data.collation` for what it is put around.

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
        separate = self._taken_apart(self.collate(samples))
        rows = []
        for indices in first_fit_decreasing(list(map(len, separate)), self.budget):
            rows.append(self._joined([separate[index] for index in indices]))
        return PackedRows(rows)

    def _taken_apart(self, batch: dict[str, Any]) -> list[_Sample]:
        """Return the samples of a padded batch, each on its own."""
        mask = batch.pop("attention_mask").bool()
        images = self._images_by_sample(batch)
        samples = []
        for index, visible in enumerate(mask):
            sample = _Sample({}, {}, images[index])
            for name, value in batch.items():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    sample.tokens[name] = value[index][visible].clone()
                elif isinstance(value, list):  # one entry a sample, such as its source
                    sample.listed[name] = value[index]
                else:
                    raise ValueError(
                        f"{name} cannot be packed: a batch holds tensors of shape (batch_size, sequence_length), lists "
                        f"of one entry a sample, and {' or '.join(IMAGE_TENSORS)}"
                    )
            # Its logits come from the last token of the sample before.
            sample.tokens["labels"][0] = IGNORED
            sample.tokens["position_ids"] = torch.arange(len(sample))
            samples.append(sample)
        return samples

    def _images_by_sample(self, batch: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        """Take the images out of a batch; return each sample's own, as tensors by name."""
        own: list[dict[str, torch.Tensor]] = [{} for _ in batch["input_ids"]]
        present = [name for name in IMAGE_TENSORS if name in batch]
        if not present:
            return own
        # A sample's placeholders tell how many of the batch's images are its own.
        placeholders = (batch["input_ids"] == self.image_token_id).sum(dim=1)
        n_images = len(batch[present[0]])
        per_image = max(1, int(placeholders.sum()) // n_images)
        counts = (placeholders // per_image).tolist()
        if (placeholders % per_image).any() or sum(counts) != n_images:
            raise ValueError(
                f"{n_images} images for {placeholders.tolist()} placeholders a sample: images of one batch must have "
                "equally many"
            )
        for name in present:
            for index, images in enumerate(batch.pop(name).split(counts)):
                if len(images):
                    own[index][name] = images
        return own

    def _joined(self, samples: Sequence[_Sample]) -> dict[str, Any]:
        """Return one row of several samples, as the model takes it."""
        # Restarting positions keep samples apart only without a cache; the model refuses them with one.
        row: dict[str, Any] = {"use_cache": False}
        for name in samples[0].tokens:
            row[name] = torch.cat([sample.tokens[name] for sample in samples]).unsqueeze(0)
        for name in samples[0].listed:
            row[name] = [sample.listed[name] for sample in samples]
        for name in IMAGE_TENSORS:
            images = [sample.images[name] for sample in samples if name in sample.images]
            if images:
                row[name] = torch.cat(images)
        lengths = list(map(len, samples))
        if self.attention == SDPA_BY_SAMPLE:
            row["sample_lengths"] = lengths
        if self.attention in FLASH:
            # Flash attention's kernels for rows of unlike lengths take where each begins and the last ends.
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
    lengths = list(sample_lengths)
    queries, keys, values = query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2)
    window = kwargs.get("sliding_window")
    outputs = []
    start = 0
    for length, *of_sample in zip(lengths, queries, keys, values, strict=True):
        # A sample as long as a sliding window, or longer, needs its own square of the mask; others are causal throughout.
        square = None
        if window is not None and length >= window and attention_mask is not None:
            square = attention_mask[..., start : start + length, start : start + length]
        output, _ = sdpa_attention_forward(module, *of_sample, square, **kwargs)
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=1), None


@contextmanager
def attend_by_sample(config: PretrainedConfig) -> Iterator[None]:
    """Let a language model, whose own configuration is given, attend with `sdpa_by_sample` for a while."""
    # Registered here, not at import; a second time changes nothing.
    AttentionInterface.register(SDPA_BY_SAMPLE, _sdpa_by_sample)
    AttentionMaskInterface.register(SDPA_BY_SAMPLE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = config._attn_implementation  # evaluation pads, and needs it back
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
    loader = DataLoader(rows, batch_size=_COUNTED_ROWS, num_workers=workers, collate_fn=partial(_lengths, collate))
    lengths = []
    for batch in tqdm(loader, desc="counting tokens", disable=None):
        lengths += batch
    return lengths


def _lengths(collate: Callable, samples: Sequence[Mapping]) -> list[int]:
    # Counted in the loader's process, so that no picture is sent from there.
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
        # A generator of its own: a resumed run has drawn other numbers from torch's by then.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
