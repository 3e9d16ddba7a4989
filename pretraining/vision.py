"""Pretraining the tiny vision tower with a dense sigmoid loss: every image cell against every word."""

import numpy as np
import torch
from torch import nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.drawing import CELL, SIZE
from siq_vl.modeling_siq_vl import pixel_shuffle


def tower_config() -> SiglipVisionConfig:
    """Return the tiny tower's configuration: 1.06M parameters, 96 px in patches of 12, no pooling head."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=CELL // 2,
        vision_use_head=False,
    )


def image_processor(side: int = SIZE) -> SiglipImageProcessor:
    """Return the preprocessing of SigLIP-2 at a tiny tower's resolution."""
    return SiglipImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def pixel_batch(samples: list[figures.FigureSample]) -> torch.Tensor:
    """Return the pictures as a float tensor (len(samples), 3, SIZE, SIZE) in [-1, 1], as the image processor would."""
    pixels = np.stack([np.asarray(sample.image) for sample in samples])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cell_words(samples: list[figures.FigureSample], word_ids: dict[str, int]) -> torch.Tensor:
    """Return multi-hot targets (len(samples), rows * columns, words): the words that can be read in each cell."""
    side = SIZE // CELL
    targets = torch.zeros(len(samples), side * side, len(word_ids))
    for index, sample in enumerate(samples):
        for (row, column), fact in sample.figure.cells().items():
            for word in fact:
                targets[index, row * side + column, word_ids[word]] = 1.0
    return targets


class TowerWithWordHead(nn.Module):
    """The tower and the throw-away head that names the words of each cell."""

    def __init__(self, words: int) -> None:
        super().__init__()
        config = tower_config()
        self.tower = SiglipVisionModel(config)
        self.head = nn.Linear(4 * config.hidden_size, words)
        nn.init.constant_(self.head.bias, -5.0)  # SigLIP's start: nearly all pairs are negative

    def forward(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid loss, summed over words and averaged over cells, a scalar."""
        logits = self.word_logits(self.tower(pixels).last_hidden_state)
        return (
            nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / targets.shape[:2].numel()
        )

    def word_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Map tower features (images, patches, hidden) to logits (images, cells, words)."""
        side = SIZE // (CELL // 2)
        return self.head(pixel_shuffle(features, side, side, 2)).float()


def figure_words() -> list[str]:
    """Return every word that a fact can hold, sorted."""
    seen = {str(number) for number in range(100)}
    for domain in figures.DOMAINS:
        for index in range(2000):
            for fact in figures.sample("train", index, seed=-1, domain=domain).figure.facts:
                seen.update(fact)
    return sorted(seen)


def read_accuracy(model: TowerWithWordHead, words: list[str], samples: list[figures.FigureSample]) -> float:
    """Return the share of labelled cells whose exact set of words is read, on pictures never trained on."""
    targets = cell_words(samples, {word: index for index, word in enumerate(words)})
    with torch.no_grad():
        read = (model.word_logits(model.tower(pixel_batch(samples)).last_hidden_state) > 0).float()
    labelled = targets.sum(-1) > 0
    return (read == targets).all(-1)[labelled].float().mean().item()
