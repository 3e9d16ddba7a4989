"""Processor of SiQ-VL: images and chat text in, model inputs out."""

import json
import os
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.image_utils import ImageInput, load_image
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack

from .configuration_siq_vl import TRANSFORMERS_4, tokens_per_image

IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)

# The image backend that gives the same numbers on both majors, whether or not torchvision is installed.
PIL_BACKEND = {"use_fast": False} if TRANSFORMERS_4 else {"backend": "pil"}


class SiQVLProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of [`SiQVLProcessor`]: those of the tokenizer and of the image processor."""

    _defaults = {"text_kwargs": {"padding": False, "return_token_type_ids": False}, "images_kwargs": {}}


class SiQVLProcessor(ProcessorMixin):
    r"""
    Joins a SigLIP image processor and a tokenizer with Qwen's special tokens.

    Each `<|image_pad|>` of the text stands for one image and is repeated once for each token that the image becomes.

    Args:
        image_processor (`SiglipImageProcessor`): Resizes and normalises images; on transformers 5 with the PIL
            backend, which gives the numbers of transformers 4.
        tokenizer (`PreTrainedTokenizerFast`): Any fast tokenizer that has `<|vision_start|>`, `<|image_pad|>`,
            `<|vision_end|>`, `<|im_start|>` and `<|im_end|>` as single tokens.
        chat_template (`str`, *optional*): Jinja template of a conversation.
        patch_size (`int`, defaults to 16): Side of a patch of the vision tower, in pixels.
        pixel_shuffle_factor (`int`, defaults to 2): Side of the block of patches that becomes one token.

    Raises:
        ValueError: if the tokenizer lacks one of the special tokens.

    Example:

    ```python
    >>> messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    >>> text = processor.apply_chat_template(messages, add_generation_prompt=True)
    >>> inputs = processor(images=image, text=text, return_tensors="pt")
    >>> output = model.generate(**inputs, max_new_tokens=64)
    >>> processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    ```

    For a batch of prompts of different lengths, generate with `padding=True, padding_side="left"`.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    valid_processor_kwargs = SiQVLProcessorKwargs

    def __init__(self, image_processor, tokenizer, chat_template=None, patch_size=16, pixel_shuffle_factor=2, **kwargs):
        missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer has no token {', '.join(missing)}, but SiQ-VL needs each of {', '.join(SPECIAL_TOKENS)}: "
                "add them with `tokenizer.add_special_tokens` and resize the embeddings of the language model."
            )
        self.patch_size = patch_size
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.image_token = IMAGE_TOKEN
        self.image_token_id, self.vision_start_token_id, self.vision_end_token_id = tokenizer.convert_tokens_to_ids(
            [IMAGE_TOKEN, "<|vision_start|>", "<|vision_end|>"]
        )
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_backbones(
        cls,
        vision_tower: str,
        language_model: str,
        *,
        pixel_shuffle_factor: int = 2,
        chat_template: Optional[str] = None,
    ) -> "SiQVLProcessor":
        """
        Builds the processor of a new model from its two backbone checkpoints.

        Args:
            vision_tower (`str`): Folder or Hub id of a SigLIP checkpoint with an image processor.
            language_model (`str`): Folder or Hub id of a language model with a tokenizer.
            pixel_shuffle_factor (`int`, defaults to 2): Side of the block of patches that becomes one token.
            chat_template (`str`, *optional*): Template to use in place of `chat_template.jinja` beside this file.

        Returns:
            [`SiQVLProcessor`]: a processor whose tokenizer has the same chat template.
        """
        vision_config = AutoConfig.from_pretrained(vision_tower)
        if vision_config.model_type == "siglip":
            vision_config = vision_config.vision_config
        if chat_template is None:
            chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
        tokenizer = _load_backbone_tokenizer(language_model)
        tokenizer.chat_template = chat_template
        return cls(
            AutoImageProcessor.from_pretrained(vision_tower, **PIL_BACKEND),
            tokenizer,
            chat_template=chat_template,
            patch_size=vision_config.patch_size,
            pixel_shuffle_factor=pixel_shuffle_factor,
        )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        return [
            AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **{**kwargs, **PIL_BACKEND}),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @property
    def image_seq_length(self) -> int:
        """`int`: number of tokens that one image becomes."""
        size = self.image_processor.size
        return tokens_per_image(size["height"], size["width"], self.patch_size, self.pixel_shuffle_factor)

    @property
    def model_input_names(self) -> list[str]:
        """`list[str]`: names of the model inputs that the processor makes."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Optional[Union[ImageInput, list[ImageInput], list[list[ImageInput]]]] = None,
        text: Optional[Union[str, list[str]]] = None,
        **kwargs: Unpack[SiQVLProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepares texts and their images for the model.

        Args:
            images (image, `list` of images or `list` of one `list` of images a text, *optional*):
                PIL images of any mode and size, arrays, paths or URLs. A flat list is dealt out to the texts in the
                order of their placeholders.
            text (`str` or `list[str]`, *optional*):
                Texts with one `<|image_pad|>` for each image. Without text, images alone are prepared.
            kwargs: Arguments of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`, and
            `pixel_values` of shape `(n_images, 3, height, width)` where there are images.

        Raises:
            ValueError: if neither is given, if the number of images differs from that of placeholders, or if
                truncation cuts through an image.
        """
        if text is None and images is None:
            raise ValueError("Got neither images nor text: pass at least one.")
        merged = self._merge_kwargs(SiQVLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        return_types = text_kwargs.pop("return_mm_token_type_ids", False) or merged.get(
            "return_mm_token_type_ids", False
        )
        images_kwargs.pop("return_tensors", None)

        texts = [text] if isinstance(text, str) else text
        flat_images, n_per_group = _flatten_images(images)
        data = {}
        if texts is not None:
            n_placeholders = [sample.count(IMAGE_TOKEN) for sample in texts]
            _check_counts(n_placeholders, len(flat_images), n_per_group)
            encoded = self.tokenizer([self.expand_image_tokens(sample) for sample in texts], **text_kwargs)
            self._check_truncation(encoded["input_ids"], n_placeholders, text_kwargs)
            data.update(encoded)
            if return_types:
                data["mm_token_type_ids"] = [
                    [int(token == self.image_token_id) for token in row] for row in encoded["input_ids"]
                ]
        if flat_images:
            data["pixel_values"] = self._pixel_values(flat_images, images_kwargs)
        return BatchFeature(data, tensor_type=return_tensors)

    def expand_image_tokens(self, text: str) -> str:
        """
        Repeats each `<|image_pad|>` once for each token of an image, as `__call__` does.

        For texts whose images were encoded earlier and come to the model as `vision_features`.
        """
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.image_seq_length)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs) -> str:
        """The text that stands for one image after expansion; asked for by serving engines."""
        return IMAGE_TOKEN * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: Optional[list[list[int]]] = None, **kwargs) -> MultiModalData:
        """Tokens and patches of images of given `(height, width)`; asked for by serving engines."""
        if image_sizes is None:
            return MultiModalData()
        n_images = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * n_images, num_image_patches=[1] * n_images)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Decodes rows of token ids; see [`PreTrainedTokenizerBase.batch_decode`]."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """Decodes token ids; see [`PreTrainedTokenizerBase.decode`]."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """
        Decodes what `generate` returned.

        Args:
            generated_outputs (`torch.Tensor` of shape `(batch_size, sequence_length)`): Token ids.
            skip_special_tokens (`bool`, defaults to `True`): Whether to leave out special tokens.

        Returns:
            `list[str]`: one text for each row.
        """
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def save_pretrained(self, save_directory: Union[str, os.PathLike], push_to_hub: bool = False, **kwargs):
        """
        Saves the processor so that transformers 4 and transformers 5 both read it.

        transformers 5 writes names that transformers 4 does not know; they are replaced by ones that both know.
        """
        if push_to_hub:
            raise ValueError(
                "Got push_to_hub=True, but files are changed after saving: use `processor.push_to_hub(repo_id)`."
            )
        files = super().save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)  # transformers 5 writes it into processor_config.json only
        path = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    def _pixel_values(self, images: list, images_kwargs: dict[str, Any]) -> np.ndarray:
        """Pixels of shape `(n_images, 3, height, width)`."""
        images = [to_rgb(load_image(image) if isinstance(image, str) else image) for image in images]
        if all(isinstance(image, Image.Image) for image in images):
            images_kwargs = {"input_data_format": "channels_last", **images_kwargs}  # a guess for images of few pixels
        return np.stack(self.image_processor(images, **images_kwargs)["pixel_values"])

    def _check_truncation(self, input_ids, n_placeholders: list[int], text_kwargs: dict[str, Any]) -> None:
        if not text_kwargs.get("truncation"):
            return
        for index, (row, n_images) in enumerate(zip(input_ids, n_placeholders, strict=True)):
            kept, wanted = row.count(self.image_token_id), n_images * self.image_seq_length
            if kept != wanted:
                raise ValueError(
                    f"Truncation to max_length={text_kwargs.get('max_length')} leaves {kept} of the {wanted} image tokens "
                    f"of text {index}: raise max_length, or drop samples that are too long."
                )


def to_rgb(image: Any) -> Any:
    """
    Converts a PIL image of any mode to RGB; anything else is returned as it is.

    Transparent pixels are composited on white. 16-bit greyscale is scaled to 8 bits, which PIL's own conversion would
    clip.
    """
    if not isinstance(image, Image.Image) or image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            values = values / 257
        image = Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _load_backbone_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """
    Loads a language model's tokenizer as its files describe it.

    For a `qwen2` checkpoint transformers 5 would build Qwen's own tokenizer around the vocabulary, even where the
    checkpoint says that it has another one.
    """
    if get_tokenizer_config(path).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _flatten_images(images: Any) -> tuple[list, Optional[list[int]]]:
    """Flattens images to a list, with the number in each group where they came as one list a text."""
    if images is None:
        return [], None
    if not isinstance(images, (list, tuple)):
        return [images], None
    if any(isinstance(group, (list, tuple)) for group in images):
        return [image for group in images for image in group], [len(group) for group in images]
    return list(images), None


def _check_counts(n_placeholders: list[int], n_images: int, n_per_group: Optional[list[int]]) -> None:
    if n_per_group is not None and n_per_group != n_placeholders:
        raise ValueError(
            f"Got {n_per_group} images for texts with {n_placeholders} placeholders, but each text needs as many images "
            f"as it has {IMAGE_TOKEN}: pass one list of images for each text, and let the chat template place them."
        )
    if sum(n_placeholders) != n_images:
        raise ValueError(
            f"Got {n_images} images for texts with {sum(n_placeholders)} placeholders, but each {IMAGE_TOKEN} needs one "
            "image: pass all images, and let the chat template place them."
        )


SiQVLProcessor.register_for_auto_class()

__all__ = ["SiQVLProcessor", "SiQVLProcessorKwargs", "to_rgb"]
