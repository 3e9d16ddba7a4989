"""Weights in llama.cpp's Q4_K, which the `gguf` package reads and does not write."""

import numpy as np

BLOCK = 256  # weights in a block, in eight parts with a scale and a minimum each
_PARTS = 8


def quantize_q4_k(weights: np.ndarray) -> np.ndarray:
    """Quantise weights to 4 bits, with scales and minima of 6 bits, by rounding between each part's ends.

    Args:
        weights: of shape `(..., width)`, with a width that is a multiple of 256.

    Returns:
        Bytes of shape `(..., width / 256 * 144)`.

    Raises:
        ValueError: the width is no multiple of 256.
    """
    if weights.shape[-1] % BLOCK:
        raise ValueError(
            f"The rows have {weights.shape[-1]} weights, but Q4_K takes multiples of {BLOCK}: hold them in another type."
        )
    parts = weights.astype(np.float32).reshape(-1, _PARTS, BLOCK // _PARTS)
    # A weight is `scale * number - minimum`, with neither below zero.
    minima = np.maximum(-parts.min(axis=2), 0)
    scales = np.maximum(parts.max(axis=2) + minima, 0) / 15
    scale_unit, scale_numbers = _in_six_bits(scales)
    minimum_unit, minimum_numbers = _in_six_bits(minima)
    scales = scale_unit.astype(np.float32)[:, None] * scale_numbers
    minima = minimum_unit.astype(np.float32)[:, None] * minimum_numbers
    divisors = np.where(scales > 0, scales, 1)
    numbers = np.round((parts + minima[..., None]) / divisors[..., None]).clip(0, 15).astype(np.uint8)
    # Two parts share 32 bytes: the first in the lower halves, the second in the upper.
    pairs = numbers.reshape(-1, _PARTS // 2, 2, BLOCK // _PARTS)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(parts), -1)
    units = np.stack([scale_unit, minimum_unit], axis=1).view(np.uint8)
    blocks = np.concatenate([units, _pack_six_bits(scale_numbers, minimum_numbers), packed], axis=1)
    return blocks.reshape(*weights.shape[:-1], -1)


def _in_six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each block's unit, in half precision, and its values as multiples of it, from 0 to 63."""
    unit = (values.max(axis=1) / 63).astype(np.float16)
    divisor = np.where(unit > 0, unit, 1).astype(np.float32)[:, None]
    return unit, np.round(values / divisor).clip(0, 63).astype(np.uint8)


def _pack_six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Pack eight scales and eight minima of 6 bits, `(n_blocks, 8)` each, into 12 bytes, as llama.cpp unpacks them."""
    first, last = slice(0, 4), slice(4, 8)
    return np.concatenate(
        [
            scales[:, first] | (scales[:, last] >> 4) << 6,
            minima[:, first] | (minima[:, last] >> 4) << 6,
            (scales[:, last] & 15) | (minima[:, last] & 15) << 4,
        ],
        axis=1,
    )
