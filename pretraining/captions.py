"""Last phase of stage 0: the language model learns to caption pictures, through a throw-away projector.

SigLIP 2 was trained with a captioning decoder and Qwen2.5 has read about pictures; without a taste of both, stage 1
has nothing to align. The tower is frozen, questions on text go on between the captions, and no question is ever asked
about a picture.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, SiglipVisionModel

from siq_vl.configuration_siq_vl import tokens_per_image
from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.rows import CAPTION_PROMPTS
from siq_vl.data.world import dataset as world
from siq_vl.modeling_siq_vl import pixel_shuffle
from siq_vl.pretraining import reading, vision
from siq_vl.pretraining.text import encode, pad, turn

Captioned = tuple[torch.Tensor, list[str]]  # pixels (pictures, 3, side, side), and a caption of each picture


class Captioner(nn.Module):
    """The language model, the throw-away projector, and the frozen tower in front of them (not a sub-module)."""

    def __init__(self, tower: SiglipVisionModel, language_model: Qwen2ForCausalLM, image_token_id: int) -> None:
        super().__init__()
        self._frozen = (tower.eval().requires_grad_(False),)  # in a tuple: neither trained nor saved with the rest
        self.language_model = language_model
        self.image_token_id = image_token_id
        self.projector = nn.Linear(4 * tower.config.hidden_size, language_model.config.hidden_size)

    def to_device(self, device: torch.device) -> Self:
        """Move everything, the frozen tower included, and return it."""
        self.to(device)
        self._frozen[0].to(device)
        return self

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        config = self._frozen[0].config
        return tokens_per_image(config.image_size, config.image_size, config.patch_size, 2)

    def caption_loss(self, pixels: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the captions' loss, a scalar.

        Args:
            pixels: (images, 3, side, side), in [-1, 1].
            rows: `input_ids`, `labels`, `attention_mask`, each (images, tokens), one picture a row.
        """
        (tower,) = self._frozen
        patches = tower.config.image_size // tower.config.patch_size
        with torch.no_grad():
            features = tower(pixels).last_hidden_state
        image_tokens = self.projector(pixel_shuffle(features, patches, patches, 2))
        embeddings = self.language_model.get_input_embeddings()(rows["input_ids"])
        where = (rows["input_ids"] == self.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, image_tokens.to(embeddings.dtype))
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=rows["attention_mask"], labels=rows["labels"]
        ).loss


def figure_batch(step: int, size: int, seed: int) -> Captioned:
    """Return the drawn figures of one training step."""
    samples = [figures.sample("train", step * size + offset, seed=seed) for offset in range(size)]
    return vision.pixel_batch(samples), [sample.figure.caption for sample in samples]


def world_batch(step: int, size: int, seed: int) -> Captioned:
    """Return the pictures of the drawn world of one training step, as large as the tower sees them."""
    pictures, captions = [], []
    for index in range(step * size, (step + 1) * size):
        sample = world.sample("train", index, seed=seed)
        pictures.append(sample.drawn.resized(reading.SIDE, reading.SIDE))
        captions.append(sample.figure.caption)
    return reading.pixel_batch(pictures), captions


def caption_rows(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], image_tokens: int
) -> dict[str, torch.Tensor]:
    """Return the padded rows that ask for these captions, one picture of `image_tokens` tokens each."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    rows = []
    for index, caption in enumerate(captions):
        prompt = CAPTION_PROMPTS[index % len(CAPTION_PROMPTS)]
        rows.append(encode(tokenizer, turn(f"{image}{prompt}", caption)))
    return pad(rows, tokenizer.pad_token_id)
