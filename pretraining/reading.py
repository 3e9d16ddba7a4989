"""Pretraining a vision tower to read at any place: dense labels of everything drawn, Muon for the encoder's matrices.

Captioning, or the words of a cell alone, teach a tiny tower nothing on pictures that are placed freely: the loss stands
still. The character of each patch is the lesson that breaks the plateau, and it needs an optimiser that uses every
direction of a matrix (Jordan et al. 2024, "Muon", in torch). Words, and the facts that a part of the picture belongs
to, are learnt on top.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from siq_vl.data.world.canvas import Drawn
from siq_vl.data.world.dataset import sample
from siq_vl.data.world.fonts import CHARACTERS
from siq_vl.data.world.labels import NOTHING, cell_words, character_labels
from siq_vl.data.world.lexicon import WORDS
from siq_vl.data.world.scatter import scattered
from siq_vl.modeling_siq_vl import pixel_shuffle

PATCH = 8  # pixels; a cell, what one image token covers, is 2 x 2 patches
CELL = 2 * PATCH
SIDE = 128  # pixels; of the pictures that the tower is made for
SMALL_SIDE = 96  # pixels; of the pictures that letters are learnt from
LETTERS_ALONE = 1500  # steps without words
WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_MATRIX_RATE = 2.0  # peak learning rate of Muon, in multiples of AdamW's
_STREWN_SHARE = 0.3  # of the pictures of the world: words with no meaning, so that reading goes on
_EMPTY_WEIGHT = 3.0  # of the patches without a character, against those with one


def tower_config(side: int) -> SiglipVisionConfig:
    """Return the configuration of a tower for pictures of `side` x `side` pixels: 1.2M parameters, no pooling head."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        vision_use_head=False,
        attn_implementation="eager",  # faster here than sdpa, in bfloat16 on a CPU
    )


class ReadingTower(nn.Module):
    """The tower, and throw-away heads that name the characters of each patch and the words of each cell."""

    def __init__(self, side: int) -> None:
        super().__init__()
        config = tower_config(side)
        self.side = side
        self.tower = SiglipVisionModel(config)
        self.letters = nn.Linear(config.hidden_size, 2 * (len(CHARACTERS) + 1))
        self.seen = nn.Linear(4 * config.hidden_size, len(WORDS))
        self.facts = nn.Linear(4 * config.hidden_size, len(WORDS))
        for head in (self.seen, self.facts):
            nn.init.constant_(head.bias, -5.0)  # SigLIP's start: nearly all pairs are negative

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits of everything there is to see.

        Args:
            pixels: (pictures, 3, side, side), in [-1, 1].

        Returns:
            `letters` (pictures, patches, 2, characters + 1), one for each half of a patch; `seen` and `facts`
            (pictures, cells, words).
        """
        features = self.tower(pixels).last_hidden_state
        patches = self.side // PATCH
        cells = pixel_shuffle(features, patches, patches, 2)
        letters = self.letters(features).unflatten(-1, (2, -1))
        return {"letters": letters.float(), "seen": self.seen(cells).float(), "facts": self.facts(cells).float()}


def load_smaller(module: ReadingTower, state: dict[str, torch.Tensor]) -> None:
    """Load the weights of a tower for smaller pictures: its position embeddings are stretched over the larger ones."""
    state = dict(state)
    own = module.state_dict()
    for name, tensor in state.items():
        if name.endswith("position_embedding.weight") and tensor.shape != own[name].shape:
            small, large = (round(weight.shape[0] ** 0.5) for weight in (tensor, own[name]))
            grid = tensor.T.reshape(1, -1, small, small)
            grid = nn.functional.interpolate(grid, size=(large, large), mode="bicubic", align_corners=True)
            state[name] = grid.reshape(tensor.shape[1], -1).T.contiguous()
    module.load_state_dict(state)


def save_reading_tower(module: ReadingTower, folder: Path) -> None:
    """Write the tower as transformers does, and beside it its heads, with which its training can go on."""
    module.tower.save_pretrained(folder)
    save_model(nn.ModuleDict(_heads(module)), str(folder / "heads.safetensors"))


def load_reading_tower(folder: Path) -> ReadingTower:
    """Return the tower and the heads of `save_reading_tower`."""
    tower = SiglipVisionModel.from_pretrained(folder)
    module = ReadingTower(tower.config.image_size)
    module.tower.load_state_dict(tower.state_dict())
    load_model(nn.ModuleDict(_heads(module)), str(folder / "heads.safetensors"))
    return module


def _heads(module: ReadingTower) -> dict[str, nn.Module]:
    return {"letters": module.letters, "seen": module.seen, "facts": module.facts}


def pixel_batch(pictures: Sequence[Drawn]) -> torch.Tensor:
    """Return square pictures of one size as a float tensor (pictures, 3, side, side) in [-1, 1]."""
    pixels = np.stack([np.asarray(picture.image) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def label_batch(pictures: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """Return the labels of `ReadingTower.forward`'s logits: `letters` as classes, `seen` and `facts` as zeros and ones."""
    letters = np.stack([character_labels(picture, PATCH) for picture in pictures])
    words = [cell_words(picture, CELL, WORD_IDS) for picture in pictures]
    return {
        "letters": torch.from_numpy(letters),
        "seen": torch.from_numpy(np.stack([seen for seen, _ in words])).float(),
        "facts": torch.from_numpy(np.stack([facts for _, facts in words])).float(),
    }


def world_picture(split: str, index: int, seed: int) -> Drawn:
    """Return one picture of the world as the tower sees it, `SIDE` pixels square."""
    rng = Random(f"world/{split}/{seed}/{index}")
    if rng.random() < _STREWN_SHARE:
        return scattered(rng, SIDE)
    return sample(split, index, seed=seed).drawn.resized(SIDE, SIDE)


def batch_losses(module: ReadingTower, pictures: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """Return the losses of a batch, on the module's device; see `dense_losses`."""
    device = module.letters.weight.device
    labels = {name: tensor.to(device) for name, tensor in label_batch(pictures).items()}
    return dense_losses(module(pixel_batch(pictures).to(device)), labels)


def dense_losses(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the loss of each kind of label, scalars.

    Of the characters: cross-entropy, averaged over the halves that hold one and, apart, over those that hold none. Of
    the words: the sigmoid loss, summed over words and averaged over cells.
    """
    entropy = nn.functional.cross_entropy(
        logits["letters"].flatten(0, -2), labels["letters"].flatten(), reduction="none"
    )
    empty = (labels["letters"] == NOTHING).flatten()
    read, unread = (entropy * ~empty).sum() / (~empty).sum().clamp(min=1), (entropy * empty).sum() / empty.sum()
    losses = {"letters": read + _EMPTY_WEIGHT * unread}
    for name in ("seen", "facts"):
        summed = nn.functional.binary_cross_entropy_with_logits(logits[name], labels[name], reduction="sum")
        losses[name] = summed / labels[name].shape[:2].numel()
    return losses


class MuonAndAdamW:
    """Muon for the matrices of the encoder's layers and AdamW for everything else, stepped as one optimiser."""

    def __init__(self, module: ReadingTower, learning_rate: float) -> None:
        """Give every parameter of `module` to one of the two; `learning_rate` is AdamW's peak, Muon's is twice that."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
        self._muon = torch.optim.Muon(
            matrices, lr=_MATRIX_RATE * learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    @property
    def param_groups(self) -> list[dict]:
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self) -> None:
        self._muon.step()
        self._adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._muon.zero_grad(set_to_none)
        self._adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
