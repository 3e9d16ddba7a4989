"""How well a picture and a text fit, told by the two towers of a SigLIP checkpoint."""

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel, SiglipConfig

from siq_vl.data.conversations import Conversation
from siq_vl.processing_siq_vl import PIL_BACKEND

logger = logging.getLogger(__name__)

FEW_WORDS = 5
BATCH_SIZE = 16


class SiglipScorer:
    """Scores pairs of pictures and texts by the cosine similarity of SigLIP's two towers.

    Args:
        model: a `SiglipModel`.
        image_processor: prepares pictures for it.
        tokenizer: prepares texts for it.
    """

    def __init__(self, model: PreTrainedModel, image_processor, tokenizer):
        self.model, self.image_processor, self.tokenizer = model.eval(), image_processor, tokenizer

    @classmethod
    def from_pretrained(cls, path: str) -> "SiglipScorer":
        """Load a checkpoint, a folder or a Hub id, on the accelerator where there is one.

        Raises:
            ValueError: the checkpoint has a vision tower alone.
        """
        config = AutoConfig.from_pretrained(path)
        if not isinstance(config, SiglipConfig):
            raise ValueError(
                f"{path} is a {config.model_type} checkpoint, which has no text tower to compare pictures with texts: "
                "set score_model to a SigLIP checkpoint with both towers, such as google/siglip2-large-patch16-512, or "
                "leave min_image_text_score out"
            )
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        return cls(
            AutoModel.from_pretrained(path).to(device),
            AutoImageProcessor.from_pretrained(path, **PIL_BACKEND),
            AutoTokenizer.from_pretrained(path),
        )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Return one similarity a pair, between -1 and 1; a long text is read up to the text tower's length."""
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        tokens = self.tokenizer(
            [text.lower() for text in texts],  # SigLIP was trained on lower case
            padding="max_length",  # as SigLIP was trained, without an attention mask
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )["input_ids"]
        output = self.model(input_ids=tokens.to(self.model.device), pixel_values=pixels.to(self.model.device))
        similarities = (normalize(output.image_embeds, dim=-1) * normalize(output.text_embeds, dim=-1)).sum(-1)
        return similarities.float().tolist()


def scored_text(conversation: Conversation) -> str:
    """Return the text that is compared with the first picture: the first answer, with its question if it is short."""
    question, answer = conversation.texts("user")[0], conversation.texts("assistant")[0]
    # "Yes" fits no picture; with its question it does.
    if len(answer.split()) < FEW_WORDS:
        return f"{question} {answer}"
    return answer
