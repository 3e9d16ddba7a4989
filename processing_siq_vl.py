"""Processor of SiQ-VL: images and chat text in, model inputs out."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.image_utils import ImageInput
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from .configuration_siq_vl import TRANSFORMERS_4, check_max_tiles, tiles_per_image, tokens_per_image
from .image_processing_siq_vl import load_rgb, resize_to_tiles, to_rgb

IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)

MOST_PIXELS = 2**26  # of an image that the vision tower reads, 8192 x 8192

# The image backend that gives the same numbers on both majors, whether or not torchvision is installed.
PIL_BACKEND = {"use_fast": False} if TRANSFORMERS_4 else {"backend": "pil"}

# What tokenizers, image processors and templates raise for what they cannot work with.
_REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    AssertionError,
    OSError,
    StrictDataclassError,
    TemplateError,
    DocstringParsingException,
    TypeHintParsingException,
)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any, least: int) -> bool:
    # The largest number of tokens that a tokenizer can count to.
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_channel_value(value: Any) -> bool:
    """One number, or one for each of the three colours."""
    return _is_finite(value) or isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_finite, value))


def _is_channel_divisor(value: Any) -> bool:
    return _is_channel_value(value) and 0 not in (value if isinstance(value, (list, tuple)) else [value])


def _is_one_of(*names: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (str, bool)) and value in names


_FLAG = (_is_flag, "True or False")
_CHANNELS = (_is_one_of("channels_first", "channels_last"), '"channels_first" or "channels_last"')

# What a keyword argument of a call may be, in code and in words; each may be None as well, which means the default.
_KEYWORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "padding": (
        _is_one_of(True, False, "longest", "max_length", "do_not_pad"),
        'True, False, "longest", "max_length" or "do_not_pad"',
    ),
    "truncation": (
        _is_one_of(True, False, "only_first", "longest_first", "do_not_truncate"),
        'True, False, "only_first", "longest_first" or "do_not_truncate"',
    ),
    "padding_side": (_is_one_of("left", "right"), '"left" or "right"'),
    "return_tensors": (_is_one_of("pt", "np"), '"pt" or "np"'),
    "max_length": (lambda value: _is_integer(value, 1), "an integer of at least 1"),
    "stride": (lambda value: _is_integer(value, 0), "an integer of at least 0"),
    "pad_to_multiple_of": (lambda value: _is_integer(value, 1), "an integer of at least 1"),
    "rescale_factor": (_is_finite, "a finite number"),
    "image_mean": (_is_channel_value, "a finite number, or three of them"),
    "image_std": (_is_channel_divisor, "a finite number other than 0, or three of them"),
    "resample": (
        lambda value: _is_integer(value, 0) and value in list(Image.Resampling),
        "one of PIL.Image.Resampling, which are 0 to 5",
    ),
    "data_format": _CHANNELS,
    "input_data_format": _CHANNELS,
    **dict.fromkeys(
        [
            "add_special_tokens",
            "do_convert_rgb",
            "do_normalize",
            "do_rescale",
            "do_resize",
            "return_attention_mask",
            "return_length",
            "return_mm_token_type_ids",
            "return_offsets_mapping",
            "return_special_tokens_mask",
            "return_text_replacement_offsets",
            "return_token_type_ids",
            "split_special_tokens",
            "verbose",
        ],
        _FLAG,
    ),
    **dict.fromkeys(
        ["is_split_into_words", "return_overflowing_tokens"],
        (lambda value: value is False, "False, because a row is one whole text with all of its images"),
    ),
    **dict.fromkeys(
        ["text_pair", "text_target", "text_pair_target", "videos", "audio"],
        (lambda value: False, "None: this processor reads `text` and `images`, and nothing else"),
    ),
}


class SiQVLProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`SiQVLProcessor`]: those of the tokenizer and of the image processor."""

    _defaults = {"text_kwargs": {"padding": False, "return_token_type_ids": False}, "images_kwargs": {}}


class SiQVLProcessor(ProcessorMixin):
    r"""
    Joins a SigLIP image processor and a tokenizer with Qwen's special tokens.

    Each `<|image_pad|>` of the text stands for one image and is repeated once for each token that the image becomes.

    A message is data: [`apply_chat_template`] writes what looks like a special token in the text of a message, such as
    `<|im_end|>`, with a space, `< |im_end|>`. So it is read as plain text, and forges neither a turn nor an image; the
    tokenizer's own `apply_chat_template` does the same, because the template does it. The `text` of a call is a
    rendered template, in which special tokens mean what they say.

    Args:
        image_processor (`SiglipImageProcessor`): Resizes and normalises images; on transformers 5 with the PIL
            backend, which gives the numbers of transformers 4.
        tokenizer (`PreTrainedTokenizerFast`): Any fast tokenizer that has `<|vision_start|>`, `<|image_pad|>`,
            `<|vision_end|>`, `<|im_start|>` and `<|im_end|>` as single tokens.
        chat_template (`str`, *optional*): Jinja template of a conversation.
        patch_size (`int`, defaults to 16): Side of a patch of the vision tower, in pixels.
        pixel_shuffle_factor (`int`, defaults to 2): Side of the block of patches that becomes one token.
        max_tiles (`int`, defaults to 1): Largest number of tiles that a large picture is cut into (AnyRes), each an
            image of its own to the vision tower, before a thumbnail of the whole. 1 resizes every picture whole.

    Raises:
        ValueError: if the tokenizer lacks one of the special tokens, or a number is no integer of at least 1.

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

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        patch_size=16,
        pixel_shuffle_factor=2,
        max_tiles=1,
        **kwargs,
    ):
        check_max_tiles(max_tiles)
        for name, value in (("patch_size", patch_size), ("pixel_shuffle_factor", pixel_shuffle_factor)):
            if not _is_integer(value, 1):
                raise ValueError(f"{name} is {value!r:.80}, but must be an integer of at least 1: correct it.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"Got a tokenizer of type {type(tokenizer).__name__}, but it must be a tokenizer of transformers: load one "
                "with `AutoTokenizer.from_pretrained`."
            )
        missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer has no token {', '.join(missing)}, but SiQ-VL needs each of {', '.join(SPECIAL_TOKENS)}: "
                "add them with `tokenizer.add_special_tokens` and resize the embeddings of the language model."
            )
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token, but rows of a batch are padded: set one that texts do not use, as with "
                "`tokenizer.pad_token = tokenizer.eos_token`, and save the tokenizer beside the language model."
            )
        self.patch_size = patch_size
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.max_tiles = max_tiles
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
        max_tiles: int = 1,
        chat_template: Optional[str] = None,
    ) -> "SiQVLProcessor":
        """
        Builds the processor of a new model from its two backbone checkpoints.

        Args:
            vision_tower (`str`): Folder or Hub id of a SigLIP checkpoint with an image processor.
            language_model (`str`): Folder or Hub id of a language model with a tokenizer.
            pixel_shuffle_factor (`int`, defaults to 2): Side of the block of patches that becomes one token.
            max_tiles (`int`, defaults to 1): Largest number of tiles that a large picture is cut into.
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
            max_tiles=max_tiles,
        )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        path = pretrained_model_name_or_path
        return [
            _loaded(AutoImageProcessor, "preprocessor_config.json", path, **{**kwargs, **PIL_BACKEND}),
            _loaded(AutoTokenizer, "tokenizer.json with its tokenizer_config.json", path, **kwargs),
        ]

    @property
    def image_seq_length(self) -> int:
        """`int`: number of tokens that one image becomes, or each of its tiles."""
        return self._tokens_per_tile(*self._tile_size({}))

    @property
    def beginning_ids(self) -> list[int]:
        """`list[int]`: what the tokenizer itself puts before a text, such as a BOS; training rows begin with it, too."""
        whole, plain = self.tokenizer("a")["input_ids"], self.tokenizer("a", add_special_tokens=False)["input_ids"]
        begin = whole[: len(whole) - len(plain)]
        if whole != begin + plain:
            raise ValueError(
                f"The tokenizer makes {whole} of 'a', whose own ids are {plain}: what it adds at the end would close "
                "every prompt. Set a post-processor that adds nothing after a text."
            )
        return begin

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
                Images of every kind that [`load_rgb`] takes: PIL images, arrays, tensors, paths, URLs or base64 text. A
                flat list is dealt out to the texts in the order of their placeholders; an array of four dimensions is
                a list of images.
            text (`str` or `list[str]`, *optional*):
                Texts with one `<|image_pad|>` for each image. Without text, images alone are prepared.
            kwargs: Arguments of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor (`size`,
                `do_normalize`, ...); `max_tiles`, to cut images into more or fewer tiles than this processor does.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`, and
            `pixel_values` of shape `(n_tiles, 3, height, width)` where there are images: the tiles of all images in
            order, one for each image unless `max_tiles` is above 1.

        Raises:
            ValueError: if neither is given, if a keyword argument has no meaning here, if the number of images differs
                from that of placeholders, if an image cannot be read, if the size does not suit the patches, if
                truncation cuts through an image, or if rows of several lengths shall become a tensor.
        """
        if text is None and images is None:
            raise ValueError("Got neither images nor text: pass at least one.")
        merged = self._merged(kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        wanted = {
            name: text_kwargs.pop(name, False) or kwargs.get(name, False)
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        }
        images_kwargs.pop("return_tensors", None)

        texts = _check_texts(text)
        flat_images, n_per_group = _flatten_images(images)
        if texts is not None:
            _check_counts([sample.count(IMAGE_TOKEN) for sample in texts], len(flat_images), n_per_group)
        data: dict[str, Any] = {}
        replacements: list[str] = []
        offsets: list = []
        if flat_images:
            data, replacements = self._process_images(flat_images, **images_kwargs)
            del data["num_tiles"]
        if texts is not None:
            texts, offsets = _replace_placeholders(texts, replacements)
            encoded = self._encode(texts, text_kwargs, return_tensors is not None)
            data = {**encoded, **data}
            if wanted["return_mm_token_type_ids"]:
                data["mm_token_type_ids"] = [
                    [int(token == self.image_token_id) for token in row] for row in encoded["input_ids"]
                ]
        features = BatchFeature(data, tensor_type=return_tensors)
        if texts is not None and wanted["return_text_replacement_offsets"]:
            features["text_replacement_offsets"] = offsets
        return features

    def _encode(self, texts: list[str], text_kwargs: dict[str, Any], equally_long: bool) -> dict[str, Any]:
        """The tokenizer's output for expanded texts, in lists, with all image tokens; on request in rows of one length."""
        stride, max_length = text_kwargs.get("stride"), text_kwargs.get("max_length")
        if stride and (max_length is None or stride >= max_length):  # the tokenizer would end the process
            raise ValueError(
                f"stride is {stride} and max_length is {max_length}, but the stride must be below the length: leave "
                "stride out, which rows of whole texts do not use."
            )
        bos = self.tokenizer.bos_token
        if bos is not None and all(text.startswith(bos) for text in texts):
            text_kwargs.setdefault("add_special_tokens", False)  # the template has written it
        try:
            encoded = self.tokenizer(texts, **text_kwargs)
        except _REFUSALS as error:
            raise ValueError(
                f"The tokenizer cannot encode the texts with {_described(text_kwargs)}: correct the keyword arguments, or "
                f"leave them out ({_one_line(error)})."
            ) from error
        self._check_image_tokens(encoded["input_ids"], texts, text_kwargs)
        lengths = sorted({len(row) for row in encoded["input_ids"]})
        if equally_long and len(lengths) > 1:
            raise ValueError(
                f"The texts have from {lengths[0]} to {lengths[-1]} tokens, but the rows of a tensor must be equally "
                "long: pass padding=True."
            )
        return encoded

    def apply_chat_template(self, conversation, chat_template: Optional[str] = None, **kwargs):
        """
        Renders a conversation, or a list of conversations, and tokenizes it with its images on request.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages with a `role` and a `content`: text, or a list of parts `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}` with an image of any kind that [`load_rgb`] takes, under the key
                `image`, `url`, `path` or `base64`. OpenAI's `image_url` parts are understood too.
            chat_template (`str`, *optional*): A template to use in place of the processor's own. Only the latter
                guards against special tokens in the text of a message.
            kwargs: See [`ProcessorMixin.apply_chat_template`]: `tokenize`, `return_dict`, `add_generation_prompt`, ...;
                `enable_thinking=False` asks for an answer without reasoning.

        Returns:
            `str`, or [`BatchFeature`] with `tokenize=True, return_dict=True`.

        Raises:
            ValueError: if a message is no message; see also [`__call__`].
        """
        for name in ("tokenize", "return_dict", "add_generation_prompt", "return_assistant_tokens_mask"):
            if not isinstance(kwargs.get(name, False), bool):
                raise ValueError(f"{name} is {kwargs[name]!r:.80}, but must be True or False: correct it.")
        conversation = getattr(conversation, "messages", conversation)
        conversations = list(conversation) if _is_list(conversation) else None
        is_batch = bool(conversations) and all(
            _is_list(messages) or hasattr(messages, "messages") for messages in conversations
        )
        if is_batch:
            conversations = [getattr(messages, "messages", messages) for messages in conversations]
        elif conversations:
            conversations = [conversations]
        if not conversations or not all(_is_list(messages) and messages for messages in conversations):
            raise ValueError(
                f"Got the conversation {conversation!r:.80}, but it must be a list of messages, or a list of such lists, "
                "none of them empty: pass some messages."
            )
        checked = [
            [_check_message(message, kwargs.get("tokenize", False)) for message in messages]
            for messages in conversations
        ]
        self._check_tools(checked, chat_template, kwargs.get("tools"))
        try:
            return super().apply_chat_template(
                checked if is_batch else checked[0], chat_template=chat_template, **kwargs
            )
        except ValueError:
            raise
        except _REFUSALS as error:
            raise ValueError(
                f"The conversation cannot be rendered with {_described({'chat_template': chat_template, **kwargs})}: "
                f"correct these arguments, or leave them out ({_one_line(error)})."
            ) from error

    def _check_tools(self, conversations: list[list[dict]], chat_template: Optional[str], tools: Any) -> None:
        """Refuses tools, and calls of them, that the template would silently leave out."""
        template = self.chat_template if chat_template is None else chat_template
        calls = [message["tool_calls"] for messages in conversations for message in messages if "tool_calls" in message]
        for name, value in [("tools", tools), *(("tool_calls", call) for call in calls)]:
            if value is not None and not _is_list(value):
                raise ValueError(f"{name} is {value!r:.80}, but must be a list: correct it, or leave it out.")
            if value and isinstance(template, str) and "tool" not in template:
                raise ValueError(
                    f"{name} is {value!r:.80}, but the chat template has no place for tools: leave it out, or pass a "
                    "chat_template that writes them."
                )

    def expand_image_tokens(self, text: str, image_sizes: Optional[list[tuple[int, int]]] = None) -> str:
        """
        Repeats each `<|image_pad|>` once for each token of an image, as `__call__` does.

        For texts whose images were encoded earlier and come to the model as `vision_features`.

        Args:
            text (`str`): A text with one `<|image_pad|>` for each image.
            image_sizes (`list[tuple[int, int]]`, *optional*): Height and width of each image before resizing; needed
                where `max_tiles` is above 1.
        """
        (text,) = _check_texts([text])
        n_images = text.count(IMAGE_TOKEN)
        if image_sizes is None and self.max_tiles > 1 and n_images:
            raise ValueError(
                f"Got no image_sizes, but max_tiles is {self.max_tiles}, so that the tokens of an image depend on its "
                "size: pass (height, width) of each image."
            )
        sizes = [(1, 1)] * n_images if image_sizes is None else _check_sizes(image_sizes)
        _check_counts([n_images], len(sizes), None)
        counts = self._get_num_multimodal_tokens(sizes)["num_image_tokens"]
        return _replace_placeholders([text], [IMAGE_TOKEN * count for count in counts])[0][0]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs) -> str:
        """
        The text that stands for one image after expansion; asked for by serving engines.

        Args:
            image_inputs (`dict`): What `_process_images` returned. Without it, the image is taken to be one tile.
            image_idx (`int`): Index of the image.
        """
        n_tiles = image_inputs["num_tiles"][image_idx] if "num_tiles" in image_inputs else 1
        size = image_inputs["pixel_values"].shape[2:] if "pixel_values" in image_inputs else self._tile_size({})
        return IMAGE_TOKEN * (n_tiles * self._tokens_per_tile(*size))

    def _get_num_multimodal_tokens(
        self, image_sizes: Optional[Sequence[Sequence[int]]] = None, **kwargs
    ) -> MultiModalData:
        """Tokens and rows of `pixel_values` of images of given `(height, width)`; asked for by serving engines."""
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merged(kwargs)["images_kwargs"]
        size, max_tiles = self._tile_size(images_kwargs), self._max_tiles(images_kwargs)
        n_tiles = [tiles_per_image(height, width, *size, max_tiles) for height, width in _check_sizes(image_sizes)]
        n_tokens = self._tokens_per_tile(*size)
        return MultiModalData(num_image_tokens=[n * n_tokens for n in n_tiles], num_image_patches=n_tiles)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Decodes rows of token ids; see [`PreTrainedTokenizerBase.batch_decode`]."""
        return _decoded(self.tokenizer.batch_decode, *args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """Decodes token ids; see [`PreTrainedTokenizerBase.decode`]."""
        return _decoded(self.tokenizer.decode, *args, **kwargs)

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
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

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
        self.__dict__.pop("auto_map", None)  # set while saving; it is no part of the processor
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    def _merged(self, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Keyword arguments by the part they are for, `text_kwargs` and `images_kwargs`, with the defaults."""
        kwargs = dict(kwargs)
        max_tiles = kwargs.pop("max_tiles", None)
        _check_keywords(kwargs)
        try:
            merged = self._merge_kwargs(
                SiQVLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
            )
        except _REFUSALS as error:
            raise ValueError(
                f"A keyword argument of {_described(kwargs)} is of the wrong type: correct it ({_one_line(error)})."
            ) from error
        merged["images_kwargs"]["max_tiles"] = self.max_tiles if max_tiles is None else max_tiles
        return merged

    def _process_images(self, images: list, **images_kwargs) -> tuple[dict[str, Any], list[str]]:
        """
        Prepares images, flat over the batch, and the text that replaces the placeholder of each.

        Returns:
            `tuple[dict, list[str]]`: `pixel_values` of shape `(n_tiles, 3, height, width)` and `num_tiles`, the number
            of tiles of each image; the replacements.
        """
        size, max_tiles = self._tile_size(images_kwargs), self._max_tiles(images_kwargs)
        images_kwargs = {name: value for name, value in images_kwargs.items() if name not in ("max_tiles", "size")}
        images = [load_rgb(image, images_kwargs.get("input_data_format")) for image in images]
        num_tiles = [1] * len(images)
        images_kwargs["size"] = {"height": size[0], "width": size[1]}
        if max_tiles > 1:
            resample = images_kwargs.get("resample", self.image_processor.resample)
            tiles = [resize_to_tiles(image, *size, max_tiles, resample) for image in images]
            num_tiles, images = [len(group) for group in tiles], [tile for group in tiles for tile in group]
            images_kwargs["do_resize"] = False
        images_kwargs["input_data_format"] = "channels_last"  # otherwise a guess, wrong for images of few pixels
        try:
            pixel_values = self.image_processor(images, **images_kwargs)["pixel_values"]
        except _REFUSALS as error:
            raise ValueError(
                f"The image processor cannot prepare the images with {_described(images_kwargs)}: correct the images or "
                f"the keyword arguments ({_one_line(error)})."
            ) from error
        shapes = {np.shape(image) for image in pixel_values}
        if len(shapes) > 1 or next(iter(shapes))[0] != 3:
            raise ValueError(
                f"The images came out in the shapes {sorted(shapes)}, but must all be (3, height, width) of one size: leave "
                "do_resize and data_format as they are, or prepare one image at a time."
            )
        image_inputs = {"pixel_values": np.stack(pixel_values), "num_tiles": num_tiles}
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(len(num_tiles))]

    def _max_tiles(self, images_kwargs: dict[str, Any]) -> int:
        """Largest number of tiles of an image; 1 where images are not resized."""
        max_tiles = images_kwargs.get("max_tiles", self.max_tiles)
        check_max_tiles(max_tiles)
        do_resize = images_kwargs.get("do_resize")
        return max_tiles if (self.image_processor.do_resize if do_resize is None else do_resize) else 1

    def _tile_size(self, images_kwargs: dict[str, Any]) -> tuple[int, int]:
        """Height and width that images, or their tiles, are resized to."""
        size = images_kwargs.get("size")
        size = self.image_processor.size if size is None else size
        sides = (size, size)
        if isinstance(size, (Mapping, type(self.image_processor.size))):  # transformers 5 has a class for sizes
            sides = (size.get("height"), size.get("width"))
        if not all(_is_integer(side, 1) for side in sides):
            raise ValueError(
                f'size is {size!r:.80}, but must be {{"height": ..., "width": ...}} with integers of at least 1, or one '
                "integer: correct it, or leave it out."
            )
        if sides[0] * sides[1] > MOST_PIXELS:
            raise ValueError(
                f"size is {size!r:.80}, but a picture or a tile of it may have at most {MOST_PIXELS} pixels: choose a "
                "smaller size."
            )
        return sides

    def _tokens_per_tile(self, height: int, width: int) -> int:
        """
        [`tokens_per_image`] of a tile that the image processor made.

        A size other than its own must consist of whole patches. Its own need not: SigLIP crops what is left over.
        """
        default = self.image_processor.size
        if (height, width) != (default["height"], default["width"]) and (
            height % self.patch_size or width % self.patch_size
        ):
            raise ValueError(
                f"The images have {height} x {width} pixels, but both sides must be multiples of the patch size, "
                f"{self.patch_size}: choose another size."
            )
        return tokens_per_image(height, width, self.patch_size, self.pixel_shuffle_factor)

    def _check_image_tokens(self, input_ids, texts: list[str], text_kwargs: dict[str, Any]) -> None:
        """Refuses ids that lost image tokens of the expanded texts."""
        for index, (row, text) in enumerate(zip(input_ids, texts, strict=True)):
            kept, wanted = row.count(self.image_token_id), text.count(IMAGE_TOKEN)
            if kept != wanted and text_kwargs.get("truncation"):
                raise ValueError(
                    f"Truncation to max_length={text_kwargs.get('max_length')} leaves {kept} of the {wanted} image tokens "
                    f"of text {index}: raise max_length, or drop samples that are too long."
                )
            if kept != wanted:
                raise ValueError(
                    f"The tokenizer made {kept} image tokens of the {wanted} in text {index}: leave split_special_tokens off."
                )


def _loaded(auto_class: Any, files: str, path: Union[str, os.PathLike], **kwargs) -> Any:
    """A part of the processor, or an `OSError` that names the files it is read from."""
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # what the tokenizers library raises for a damaged file has no class of its own
        raise OSError(
            f"{path} has no {files} that can be read: copy the files of the checkpoint again, or save its processor again "
            f"with `save_pretrained` ({_one_line(error)})."
        ) from error


def _load_backbone_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """
    Loads a language model's tokenizer as its files describe it.

    For a `qwen2` checkpoint transformers 5 would build Qwen's own tokenizer around the vocabulary, even where the
    checkpoint says that it has another one.
    """
    if get_tokenizer_config(path).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _check_texts(text: Any) -> Optional[list[str]]:
    """Wraps one text in a list, and refuses what no tokenizer can encode."""
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(sample, str) for sample in texts):
        raise ValueError(f"Got the text {text!r:.80}, but it must be a str or a list of str: join pre-tokenized words.")
    for index, sample in enumerate(texts):
        if surrogate := re.search("[\ud800-\udfff]", sample):
            raise ValueError(
                f"Text {index} holds half a character, {surrogate.group()!r} at {surrogate.start()}, but must be valid "
                "Unicode: decode it again, or drop it with `text.encode(errors='ignore').decode()`."
            )
    return list(texts)


def _check_sizes(image_sizes: Any) -> list[tuple[int, int]]:
    """Height and width of each image, as plain integers."""
    try:
        sizes = [(int(height), int(width)) for height, width in image_sizes]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"image_sizes is {image_sizes!r:.80}, but must be a list with (height, width) of each image: pass integers."
        ) from error
    return sizes


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _check_message(message: Any, tokenize: bool) -> dict[str, Any]:
    """Checks a message, and brings its content to the parts that templates and both majors of transformers know."""
    fields = _fields(message)
    if fields is None or not isinstance(fields.get("role"), str):
        raise ValueError(f"Got the message {message!r:.80}, but it must be a dict with a role: pass role and content.")
    fields = {name: value for name, value in fields.items() if value is not None}
    content = fields.get("content")
    if isinstance(content, str):  # transformers 4 tokenizes parts only
        return {**fields, "content": [{"type": "text", "text": content}]} if tokenize else fields
    if not _is_list(content):
        raise ValueError(
            f"A message has the content {content!r:.80}, but it must be a str or a list of parts: pass one."
        )
    return {**fields, "content": [_check_part(part) for part in content]}


def _fields(value: Any) -> Optional[dict[str, Any]]:
    """The fields of a message, or of a part of one, that is a mapping, a dataclass or a pydantic model."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)) and not isinstance(value, type):
        return value.model_dump()
    return None


def _check_part(part: Any) -> dict[str, Any]:
    """Brings a part of a message to `{"type": "text", "text": ...}` or `{"type": "image", <where it is>: ...}`."""
    fields = _fields(part)
    kind = part if fields is None else fields.get("type")
    if fields is None or not isinstance(kind, str) or kind not in ("text", "image", "image_url"):
        raise ValueError(f'Content of type {kind!s:.80} is not supported: use "image" or "text".')
    if kind == "text":
        if not isinstance(fields.get("text"), str):
            raise ValueError(
                f"A part of type text has the text {fields.get('text')!r:.80}, but it must be a str: pass one."
            )
        return fields
    for key in ("image", "url", "path", "base64", "image_url"):
        source = fields.get(key)
        if key == "image_url" and _fields(source) is not None:
            source = _fields(source).get("url")
        if source is not None:
            return {"type": "image", "url" if key == "image_url" else key: source}
    return {"type": "image"}


def _check_keywords(kwargs: dict[str, Any]) -> None:
    """Refuses keyword arguments, flat or by the part that they are for, that have no meaning for a call."""
    for name, value in kwargs.items():
        if name in ("text_kwargs", "images_kwargs", "common_kwargs"):
            if not isinstance(value, dict):
                raise ValueError(f"{name} is {value!r:.80}, but must be a dict of keyword arguments: pass one.")
            _check_keywords(value)
        elif name in _KEYWORDS and value is not None:
            is_right, rule = _KEYWORDS[name]
            if not is_right(value):
                raise ValueError(f"{name} is {value!r:.80}, but must be {rule}: correct it, or leave it out.")


def _decoded(decode: Callable, *args, **kwargs) -> Any:
    """What a method of the tokenizer makes of token ids, or an error that says why it cannot."""
    try:
        return decode(*args, **kwargs)
    except _REFUSALS as error:
        given = {**{f"argument {index}": value for index, value in enumerate(args)}, **kwargs}
        raise ValueError(
            f"Got {_described(given)} to decode, but token ids are integers of at least 0, in one row for `decode` and in "
            f"rows for `batch_decode`: convert them, and replace labels of -100 first ({_one_line(error)})."
        ) from error


def _described(kwargs: dict[str, Any]) -> str:
    """Keyword arguments as an error names them."""
    return ", ".join(f"{name}={value!r:.80}" for name, value in kwargs.items())


def _one_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join((str(error) or type(error).__name__).split())[:400]


def _flatten_images(images: Any) -> tuple[list, Optional[list[int]]]:
    """Flattens images to a list, with the number in each group where they came as one list a text."""

    def is_group(value: Any) -> bool:
        return _is_list(value) or isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4

    if images is None:
        return [], None
    if not is_group(images):
        return [images], None
    if not any(is_group(group) for group in images):
        return list(images), None
    if not all(is_group(group) for group in images):
        raise ValueError(
            "Got single images among lists of images: pass a flat list, or one list of images for each text."
        )
    return [image for group in images for image in group], [len(group) for group in images]


def _replace_placeholders(texts: list[str], replacements: list[str]) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """
    Replaces the placeholder of each image.

    Args:
        texts (`list[str]`): Texts with one `<|image_pad|>` for each image.
        replacements (`list[str]`): One text for each image.

    Returns:
        `tuple[list[str], list[list[dict]]]`: the texts, and where in each a placeholder was (`span`) and its replacement
        is (`new_span`), as serving engines ask for it.
    """
    remaining = iter(replacements)
    expanded, offsets = [], []
    for text in texts:
        entries, pieces, end, grown = [], [], 0, 0
        for match in re.finditer(re.escape(IMAGE_TOKEN), text):
            replacement = next(remaining)
            start = match.start() + grown
            entries.append(
                {
                    "type": "image",
                    "span": match.span(),
                    "new_span": (start, start + len(replacement)),
                    "text": IMAGE_TOKEN,
                    "replacement": replacement,
                }
            )
            pieces += [text[end : match.start()], replacement]
            end, grown = match.end(), grown + len(replacement) - len(IMAGE_TOKEN)
        expanded.append("".join([*pieces, text[end:]]))
        offsets.append(entries)
    return expanded, offsets


def _check_counts(n_placeholders: list[int], n_images: int, n_per_group: Optional[list[int]]) -> None:
    if n_per_group is not None and n_per_group != n_placeholders:
        raise ValueError(
            f"Got {n_per_group} images for texts with {n_placeholders} placeholders, but the number of {IMAGE_TOKEN} "
            "tokens in the prompts should be the same as the number of images in each: pass one list of images for each "
            "text, and let the chat template place them."
        )
    if sum(n_placeholders) != n_images:
        raise ValueError(
            f"Got {n_images} images for texts with {sum(n_placeholders)} placeholders, but the number of {IMAGE_TOKEN} "
            "tokens in the prompts should be the same as the number of images: pass all images, and let the chat template place them."
        )


SiQVLProcessor.register_for_auto_class()

__all__ = ["SiQVLProcessor", "SiQVLProcessorKwargs", "load_rgb", "to_rgb"]
