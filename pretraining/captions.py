"""Last phase of stage 0: the language model learns to caption pictures, through a throw-away projector.

SigLIP 2 was trained with a captioning decoder and Qwen2.5 has read about pictures; without a taste of both, stage 1
has nothing to align. The tower is frozen, questions on text go on between the captions, and no question is ever asked
about a picture.
"""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, SiglipVisionModel

from siq_vl.configuration_siq_vl import tokens_per_image
from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.drawing import CELL, SIZE
from siq_vl.data.figures.rows import CAPTION_PROMPTS
from siq_vl.modeling_siq_vl import pixel_shuffle
from siq_vl.pretraining.text import encode, pad, turn
from siq_vl.pretraining.vision import pixel_batch

_SIDE = SIZE // (CELL // 2)  # patches
_IMAGE = "<|vision_start|>" + "<|image_pad|>" * tokens_per_image(SIZE, SIZE, CELL // 2, 2) + "<|vision_end|>"


class Captioner(nn.Module):
    """The language model, the throw-away projector, and the frozen tower in front of them (not a sub-module)."""

    def __init__(self, tower: SiglipVisionModel, language_model: Qwen2ForCausalLM, image_token_id: int) -> None:
        super().__init__()
        self._frozen = (tower.eval().requires_grad_(False),)  # in a tuple: neither trained nor saved with the rest
        self.language_model = language_model
        self.image_token_id = image_token_id
        self.projector = nn.Linear(4 * tower.config.hidden_size, language_model.config.hidden_size)

    def to_device(self, device: torch.device) -> None:
        """Move everything, the frozen tower included."""
        self.to(device)
        self._frozen[0].to(device)

    def caption_loss(self, pixels: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the captions' loss, a scalar.

        Args:
            pixels: (images, 3, SIZE, SIZE).
            rows: `input_ids`, `labels`, `attention_mask`, each (images, tokens), one picture a row.
        """
        (tower,) = self._frozen
        with torch.no_grad():
            features = tower(pixels).last_hidden_state
        image_tokens = self.projector(pixel_shuffle(features, _SIDE, _SIDE, 2))
        embeddings = self.language_model.get_input_embeddings()(rows["input_ids"])
        where = (rows["input_ids"] == self.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, image_tokens.to(embeddings.dtype))
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=rows["attention_mask"], labels=rows["labels"]
        ).loss


def caption_batch(
    tokenizer: PreTrainedTokenizerFast, step: int, size: int, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the pixels of one training step and the padded rows that ask for their captions."""
    samples = [figures.sample("train", step * size + offset, seed=seed) for offset in range(size)]
    prompts = (CAPTION_PROMPTS[offset % len(CAPTION_PROMPTS)] for offset in range(size))
    rows = [
        encode(tokenizer, turn(f"{_IMAGE}{prompt}", sample.figure.caption))
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    return pixel_batch(samples), pad(rows, tokenizer.pad_token_id)
