"""Where a model looked: the attention of generated tokens to image tokens, and the heat map that it makes of a picture."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache

from siq_vl.configuration_siq_vl import tile_grid
from siq_vl.modeling_siq_vl import CACHE, SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor


def eager_twin(model: SiQVLForConditionalGeneration) -> SiQVLForConditionalGeneration:
    """Return a copy of a model that shares every weight, and whose language model returns its attention.

    Only eager attention returns it. The model itself keeps the faster kind, and is not switched while others use it.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    language_model: Any = twin.language_model
    language_model.set_attn_implementation("eager")
    return twin


@torch.inference_mode()
def attention_to_image(
    twin: SiQVLForConditionalGeneration, sequences: torch.LongTensor, cache: Cache, start: int
) -> np.ndarray:
    """Return how much each generated token looked at each image token, the mean over layers and heads.

    A token is chosen by the position before it, so its attention is that position's. Only these positions are run
    again, on what `generate` has kept of the prompt.

    Args:
        twin: what `eager_twin` made of the model.
        sequences: of shape `(1, start + n_generated)`: what `generate` returned.
        cache: of the same generation; cut back to the prompt.
        start: length of the prompt.

    Returns:
        Array of shape `(n_generated, n_image_tokens)`. A row's sum is the share of attention that fell on the picture.
    """
    cache.crop(start - 1 - cache.get_seq_length())
    outputs = twin(input_ids=sequences[:, start - 1 : -1], output_attentions=True, **{CACHE: cache})
    on_image = (sequences[0, :start] == twin.config.image_token_id).nonzero()[:, 0]
    layers = []
    for layer in outputs.attentions:  # (1, n_heads, n_generated, n_tokens so far)
        layers.append(layer[0, :, :, on_image].float().mean(0))
    return torch.stack(layers).mean(0).cpu().numpy()


@dataclass(frozen=True)
class ImageTokenLayout:
    """How a picture became image tokens.

    Args:
        rows: rows of tiles, row by row in the order of the tokens; a thumbnail of the whole follows where there are several.
        columns: columns of tiles.
        height: of a tile, in pixels.
        width: of a tile, in pixels.
        patch: side of a patch, in pixels; what is left over at the bottom and on the right of a tile is not seen.
        factor: side of the block of patches that became one token; odd grids of patches were padded.
    """

    rows: int
    columns: int
    height: int
    width: int
    patch: int
    factor: int

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens of one tile."""
        return -(-self._patches[0] // self.factor), -(-self._patches[1] // self.factor)

    @property
    def _patches(self) -> tuple[int, int]:
        return self.height // self.patch, self.width // self.patch

    def heat_map(self, weights: np.ndarray) -> np.ndarray:
        """Spread the weights of image tokens over the picture.

        Every token's weight is shared by the part of the picture that it stands for, padding left out; a thumbnail's lies
        over all of it.

        Args:
            weights: of shape `(n_image_tokens,)`.

        Returns:
            Array that covers the picture, in the largest cells that patches and tiles allow; it sums to what `weights`
            sum to.

        Raises:
            ValueError: the number of weights is not that of this picture's tokens.
        """
        tiles = self.rows * self.columns
        # Where there are several tiles, a thumbnail of the whole picture comes after them.
        shape = (tiles + (tiles > 1), *self.token_grid)
        if weights.shape != (math.prod(shape),):
            raise ValueError(
                f"weights has the shape {weights.shape}, but the picture has {math.prod(shape)} image tokens "
                f"({shape[0]} x {shape[1]} x {shape[2]}): pass one weight for each"
            )
        cells = np.stack([self._spread(tile) for tile in weights.reshape(shape)])
        height, width = cells.shape[1:]
        # Lay the tiles side by side again, as they were cut out of the picture.
        in_grid = cells[:tiles].reshape(self.rows, self.columns, height, width).swapaxes(1, 2)
        canvas = in_grid.reshape(self.rows * height, self.columns * width)
        if tiles > 1:
            canvas = canvas + _repeat(cells[-1], self.rows, self.columns) / tiles
        return canvas

    def _spread(self, weights: np.ndarray) -> np.ndarray:
        """Bring the weights of a tile, `(token rows, token columns)`, to cells: a patch each, or what divides the tile too."""
        rows, columns = self._patches
        # How many patches of the picture each token stands for: fewer where its block was padded.
        covered = np.ones((rows, columns))
        covered = np.pad(covered, ((0, -rows % self.factor), (0, -columns % self.factor)))
        covered = covered.reshape(weights.shape[0], self.factor, weights.shape[1], self.factor).sum((1, 3))
        patches = _repeat(weights / covered, self.factor, self.factor)[:rows, :columns]
        # A patch may not divide the tile: cells that divide both let what is left over be drawn, too.
        cell = math.gcd(self.patch, self.height, self.width)
        split = self.patch // cell
        cells = _repeat(patches, split, split) / split**2
        return np.pad(cells, ((0, self.height // cell - cells.shape[0]), (0, self.width // cell - cells.shape[1])))


def picture_layout(processor: SiQVLProcessor, height: int, width: int) -> ImageTokenLayout:
    """Return how a processor cuts a picture of a size in pixels into image tokens."""
    size = processor.image_processor.size
    rows, columns = tile_grid(height, width, size["height"], size["width"], processor.max_tiles)
    return ImageTokenLayout(
        rows, columns, size["height"], size["width"], processor.patch_size, processor.pixel_shuffle_factor
    )


@dataclass(frozen=True)
class AttentionMap:
    """Where the tokens of one output looked.

    Args:
        weights: of shape `(n_generated, n_image_tokens)`, see `attention_to_image`.
        ends: how long the output's text is, in characters, after each of its tokens.
        layout: of the picture.
    """

    weights: np.ndarray
    ends: Sequence[int]
    layout: ImageTokenLayout

    def of(self, start: int, end: int) -> tuple[np.ndarray, float]:
        """Return the heat map of the characters `start` to `end` of the text, and the share of attention on the picture.

        It is the mean over the tokens that wrote any of these characters.

        Raises:
            ValueError: no token wrote them.
        """
        wrote = []
        token_start = 0
        for place, token_end in enumerate(self.ends):
            if token_start < end and token_end > start:
                wrote.append(place)
            token_start = token_end
        if not wrote:
            raise ValueError(
                f"no token wrote the characters {start} to {end} of {self.ends[-1]}: pass a part of the text"
            )
        mean = self.weights[wrote].mean(0)
        return self.layout.heat_map(mean), float(mean.sum())


def _repeat(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return array.repeat(rows, axis=0).repeat(columns, axis=1)
