"""Configuration of SiQ-VL: a SigLIP-2 vision tower, a pixel-shuffle projector and a decoder-only language model."""

import copy
import os
from typing import Any, Optional, Union

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

# google/siglip2-large-patch16-512 without its attention-pooling head.
DEFAULT_VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 512,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}

# Qwen/Qwen2.5-0.5B-Instruct.
DEFAULT_TEXT_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# Every auto class that can load a checkpoint. `AutoModelForVision2Seq` is what transformers 4 calls
# `AutoModelForImageTextToText`; `AutoModelForMultimodalLM` exists on transformers 5 only.
AUTO_MAP = {
    "AutoConfig": "configuration_siq_vl.SiQVLConfig",
    "AutoModel": "modeling_siq_vl.SiQVLModel",
    "AutoModelForImageTextToText": "modeling_siq_vl.SiQVLForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_siq_vl.SiQVLForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_siq_vl.SiQVLForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_siq_vl.SiQVLForConditionalGeneration",
    "AutoProcessor": "processing_siq_vl.SiQVLProcessor",
}

PROJECTOR_TYPES = ("linear", "mlp")

TRANSFORMERS_4 = transformers.__version__.startswith("4.")

# Decoders held against their own classes on both majors of transformers, in tests/test_decoders.py: with text and
# pictures, cached, padded, packed, and with LoRA on every linear layer.
DECODERS = (
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "smollm3",
    "olmo",
    "olmo2",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "cohere",
    "cohere2",
    "starcoder2",
    "glm",
    "helium",
)
_MIXTURE = "its experts' weights have other names on transformers 4 than on 5"
_STATE = "it keeps a state from token to token, with a cache of its own"
_POSITIONS = "it does not keep samples packed into a row apart by position_ids, on both majors of transformers"
_LENGTHS = "its attention on transformers 4 cannot be told the lengths of the samples packed into a row"
_NAMES = "its embedding, output layer or linear layers are not of the form that weights and LoRA are found by"
_WHY_NOT = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss"), _MIXTURE),
    **dict.fromkeys(("lfm2", "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "rwkv"), _STATE),
    **dict.fromkeys(("opt", "bloom", "mpt"), _POSITIONS),
    **dict.fromkeys(("stablelm", "nemotron"), _LENGTHS),
    **dict.fromkeys(("gpt2", "gpt_neox", "gptj", "gpt_bigcode", "falcon"), _NAMES),
    "phi": "its output layer has a bias, which SiQ-VL's has not",
    "bert": "it reads in both directions and writes no text",
    "roberta": "it reads in both directions and writes no text",
    "gemma3": "it has a vision tower of its own; its text part alone is of type 'gemma3_text'",
}


def check_decoder(text_config: PretrainedConfig) -> None:
    """
    Refuses a language model that SiQ-VL is not known to run as its own class does.

    Args:
        text_config (`PretrainedConfig`): Configuration of the language model.

    Raises:
        ValueError: if its type is not among `DECODERS`, or a setting makes its output another than is computed here.
    """
    model_type = text_config.model_type
    if model_type not in DECODERS:
        reason = _WHY_NOT.get(model_type, "nobody has checked that its outputs are those of its own class")
        raise ValueError(
            f"The language model is of type {model_type!r}, but {reason}: use one of {', '.join(DECODERS)}. To add "
            "another, name it in `DECODERS` of configuration_siq_vl.py and in tests/test_decoders.py, and let that pass."
        )


def tokens_per_image(height: int, width: int, patch_size: int, pixel_shuffle_factor: int) -> int:
    """
    Number of language-model tokens that one image becomes.

    The tower cuts the image into `(height // patch_size, width // patch_size)` patches; the pixel shuffle merges each
    `factor x factor` block of patches into one token, after padding odd grids up to the next multiple of the factor.

    Args:
        height (`int`): Image height in pixels, after resizing.
        width (`int`): Image width in pixels, after resizing.
        patch_size (`int`): Side of a square patch in pixels.
        pixel_shuffle_factor (`int`): Side of the block of patches that becomes one token.

    Returns:
        `int`: `ceil(rows / factor) * ceil(columns / factor)`.

    Raises:
        ValueError: if the factor is below 1, or a side is smaller than one patch.

    Example:

    ```python
    >>> tokens_per_image(512, 512, patch_size=16, pixel_shuffle_factor=2)
    256
    >>> tokens_per_image(384, 384, patch_size=14, pixel_shuffle_factor=2)  # 27 x 27 patches, padded to 28 x 28
    196
    ```
    """
    if pixel_shuffle_factor < 1:
        raise ValueError(
            f"pixel_shuffle_factor is {pixel_shuffle_factor}, but must be at least 1: use 1 for no shuffle."
        )
    if not 1 <= patch_size <= min(height, width):
        raise ValueError(
            f"patch_size is {patch_size} for an image of {height} x {width} pixels, but must lie between 1 and the "
            "shorter side: choose a larger image size or a smaller patch."
        )
    rows, columns = height // patch_size, width // patch_size
    return -(-rows // pixel_shuffle_factor) * -(-columns // pixel_shuffle_factor)


def tile_grid(height: int, width: int, tile_height: int, tile_width: int, max_tiles: int) -> tuple[int, int]:
    """
    Rows and columns of the tiles that a picture is cut into, after being resized to fill them.

    The grid is the one whose coarser side keeps most of the picture's resolution; of equals, the one with the fewest
    tiles. So it follows the aspect ratio, and a picture that fits into one tile stays whole: no grid is considered that
    would enlarge a side by more than a third.

    Args:
        height (`int`): Height of the picture in pixels.
        width (`int`): Width of the picture in pixels.
        tile_height (`int`): Height of a tile in pixels.
        tile_width (`int`): Width of a tile in pixels.
        max_tiles (`int`): Largest number of tiles; 1 means that pictures are resized whole.

    Returns:
        `tuple[int, int]`: rows and columns, with `rows * columns <= max_tiles`.

    Raises:
        ValueError: if a side or the number of tiles is below 1.

    Example:

    ```python
    >>> tile_grid(1080, 1920, 512, 512, max_tiles=6)
    (2, 3)
    >>> tile_grid(300, 2000, 512, 512, max_tiles=6)
    (1, 4)
    ```
    """
    if min(height, width, tile_height, tile_width) < 1:
        raise ValueError(
            f"Got a picture of {height} x {width} pixels for tiles of {tile_height} x {tile_width}, but each side must "
            "be at least 1: leave empty pictures out."
        )
    check_max_tiles(max_tiles)

    def kept(grid: tuple[int, int]) -> float:
        return min(1.0, grid[0] * tile_height / height, grid[1] * tile_width / width)

    # More than this would enlarge a side by more than a third.
    most_rows = max(1, 4 * height // (3 * tile_height))
    most_columns = max(1, 4 * width // (3 * tile_width))
    grids = [
        (rows, columns)
        for rows in range(1, min(most_rows, max_tiles) + 1)
        for columns in range(1, min(most_columns, max_tiles // rows) + 1)
    ]
    return max(grids, key=lambda grid: (kept(grid), -grid[0] * grid[1]))


def tiles_per_image(height: int, width: int, tile_height: int, tile_width: int, max_tiles: int) -> int:
    """
    Number of tiles of a picture, with the thumbnail of the whole that follows where it is cut.

    Each is an image to the vision tower, and takes [`tokens_per_image`] tokens. See [`tile_grid`] for the arguments.
    """
    rows, columns = tile_grid(height, width, tile_height, tile_width, max_tiles)
    return rows * columns + (rows * columns > 1)


def check_max_tiles(max_tiles: int) -> None:
    """Raises a `ValueError` unless `max_tiles` is an integer of at least 1."""
    if not isinstance(max_tiles, int) or isinstance(max_tiles, bool) or max_tiles < 1:
        raise ValueError(
            f"max_tiles is {max_tiles!r}, but must be an integer of at least 1: use 1 to resize pictures whole."
        )


class SiQVLConfig(PretrainedConfig):
    r"""
    Configuration of [`SiQVLModel`] and [`SiQVLForConditionalGeneration`].

    The defaults describe the model of the tech report: `google/siglip2-large-patch16-512` and
    `Qwen/Qwen2.5-0.5B-Instruct`, joined by a linear projector over 2x2 pixel-shuffled patches.

    Args:
        vision_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower, of model type `siglip_vision_model`. The attention-pooling head is
            always left out: the language model reads the patches.
        text_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of a decoder whose type is among `DECODERS`; others are refused, see [`check_decoder`].
        projector_type (`str`, defaults to `"linear"`):
            `"linear"` is one linear layer; `"mlp"` adds a GELU and a second linear layer around a residual.
        pixel_shuffle_factor (`int`, defaults to 2):
            Side of the square block of patches that becomes one image token.
        projector_bias (`bool`, defaults to `True`):
            Whether the projector's linear layers have a bias.
        image_token_id (`int`, defaults to 151655):
            Id of `<|image_pad|>`, the placeholder that image features replace.
        vision_start_token_id (`int`, defaults to 151652):
            Id of `<|vision_start|>`, the token before an image.
        vision_end_token_id (`int`, defaults to 151653):
            Id of `<|vision_end|>`, the token after an image.
        tie_word_embeddings (`bool`, *optional*):
            Whether the output layer shares the input embeddings; taken from `text_config` where not given.

    Raises:
        ValueError: if a field, or a combination of fields, cannot describe a working model.

    Example:

    ```python
    >>> config = SiQVLConfig()
    >>> config.image_seq_length
    256
    ```
    """

    model_type = "siq_vl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]

    def __init__(
        self,
        vision_config: Optional[Union[PretrainedConfig, dict[str, Any]]] = None,
        text_config: Optional[Union[PretrainedConfig, dict[str, Any]]] = None,
        projector_type: str = "linear",
        pixel_shuffle_factor: int = 2,
        projector_bias: bool = True,
        image_token_id: int = 151655,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        tie_word_embeddings: Optional[bool] = None,
        auto_map: Optional[dict[str, str]] = None,
        **kwargs,
    ):
        self.vision_config = _build_sub_config("vision_config", vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = _build_sub_config("text_config", text_config, DEFAULT_TEXT_CONFIG)
        self.projector_type = projector_type
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.projector_bias = projector_bias
        self.image_token_id = image_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        self._validate()

        self.vision_config.vision_use_head = False
        _read_rope_parameters(self.text_config)
        if tie_word_embeddings is None:
            tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.auto_map = dict(AUTO_MAP) if auto_map is None else auto_map

    @property
    def image_seq_length(self) -> int:
        """`int`: number of placeholder tokens of one image, [`tokens_per_image`] of a square image."""
        vision = self.vision_config
        return tokens_per_image(vision.image_size, vision.image_size, vision.patch_size, self.pixel_shuffle_factor)

    @property
    def tie_word_embeddings(self) -> bool:
        """`bool`: whether the output layer shares the input embeddings; kept in `text_config`, in one place for both majors."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    def save_pretrained(self, save_directory: Union[str, os.PathLike], **kwargs):
        """
        Saves the configuration, with the code files and the full `auto_map` that points to them.

        A configuration that was loaded from the Hub refers to the repository its code came from; the copy refers to
        the code saved beside it.
        """
        self.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Turns the configuration into a dict of all its fields."""
        fields = super().to_dict()
        fields["tie_word_embeddings"] = self.tie_word_embeddings
        if TRANSFORMERS_4:  # transformers 5 drops the other major's names whenever it reads the text configuration
            fields["text_config"].update(_rope_of_both_majors(fields["text_config"]))
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """Turns the configuration into the dict that is saved, which both majors of transformers read alike."""
        fields = super().to_diff_dict()
        fields["text_config"].update(_rope_of_both_majors(self.text_config.to_dict()))
        return fields

    def _validate(self) -> None:
        if self.vision_config.model_type != "siglip_vision_model":
            raise ValueError(
                f"vision_config.model_type is {self.vision_config.model_type!r}, but the tower must be of type "
                "'siglip_vision_model': pass the `vision_config` of a SigLIP or fixed-resolution SigLIP-2 checkpoint."
            )
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"projector_type is {self.projector_type!r}, but must be one of {PROJECTOR_TYPES}: set one of these."
            )
        if not isinstance(self.pixel_shuffle_factor, int) or isinstance(self.pixel_shuffle_factor, bool):
            raise ValueError(
                f"pixel_shuffle_factor is {self.pixel_shuffle_factor!r}, but must be an integer: 2 is the usual value."
            )
        if not isinstance(self.projector_bias, bool):
            raise ValueError(f"projector_bias is {self.projector_bias!r}, but must be a boolean: set true or false.")
        check_decoder(self.text_config)
        numbers = {
            "vision_config.image_size": self.vision_config.image_size,
            "vision_config.patch_size": self.vision_config.patch_size,
            "text_config.vocab_size": self.text_config.vocab_size,
        }
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, but must be an integer: correct it in config.json.")
        self._validate_token_ids()
        # Checks the grid; a config that cannot say how many tokens an image takes is of no use.
        _ = self.image_seq_length

    def _validate_token_ids(self) -> None:
        ids = {
            "image_token_id": self.image_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
        }
        vocab_size = self.text_config.vocab_size
        for name, value in ids.items():
            if not isinstance(value, int) or not 0 <= value < vocab_size:
                raise ValueError(
                    f"{name} is {value!r}, but must be an integer from 0 to {vocab_size - 1}, inside the vocabulary of "
                    "the language model: look it up in the tokenizer, or resize the embeddings first."
                )
        if len(set(ids.values())) != len(ids):
            raise ValueError(
                f"The special tokens have the ids {ids}, but these must differ: look them up in the tokenizer."
            )


def _build_sub_config(
    name: str, value: Optional[Union[PretrainedConfig, dict[str, Any]]], default: dict[str, Any]
) -> PretrainedConfig:
    """Turns a configuration, its dict or `None` into a configuration of its own, never shared with the caller."""
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value)
    if value is None:
        value = default
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}, but must be a configuration, a dict or None: pass one.")
    fields = copy.deepcopy(value)
    model_type = fields.pop("model_type", default["model_type"])
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} does not describe a model of type {model_type!r} that transformers {transformers.__version__} can "
            f"build: correct it in config.json, or install the version that wrote it ({reason})."
        ) from error


def _read_rope_parameters(text_config: PretrainedConfig) -> None:
    """Moves what transformers 5 saved as `rope_parameters` to where transformers 4 looks for it."""
    parameters = text_config.to_dict().get("rope_parameters")
    if not TRANSFORMERS_4 or not parameters:
        return
    if "rope_theta" in parameters:
        text_config.rope_theta = parameters["rope_theta"]
    if parameters.get("rope_type", "default") != "default":
        text_config.rope_scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    del text_config.rope_parameters


def _rope_of_both_majors(text_fields: dict[str, Any]) -> dict[str, Any]:
    """
    The rotary settings of a language model under the names of the other major of transformers.

    transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; each silently takes its
    default base of 10,000 for a checkpoint that has only the other's. Settings nested by layer type have no counterpart
    in transformers 4.
    """
    if TRANSFORMERS_4:
        if text_fields.get("rope_theta") is None:
            return {}
        scaling = text_fields.get("rope_scaling") or {"rope_type": "default"}
        return {"rope_parameters": {**scaling, "rope_theta": text_fields["rope_theta"]}}
    parameters = dict(text_fields.get("rope_parameters") or {})
    if "rope_theta" not in parameters:
        return {}
    theta = parameters.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if parameters.get("rope_type") == "default" else parameters}


SiQVLConfig.register_for_auto_class()

__all__ = ["SiQVLConfig", "tile_grid", "tiles_per_image", "tokens_per_image"]
