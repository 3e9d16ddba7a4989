"""
PyTorch model of SiQ-VL: SigLIP-2 vision tower -> pixel-shuffle projector -> decoder-only language model.

Shapes below use `n_images` for the number of images in the whole batch, in the order in which their placeholders occur,
`n_patches` for the patches of one image and `n_tokens` for its image tokens (`config.image_seq_length` for images of
`config.vision_config.image_size`). The tiles of a picture that the processor cuts (`max_tiles`) are images here.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipVisionModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig, check_decoder, tokens_per_image
from .generation_siq_vl import ThinkingBudgetLogitsProcessor

logger = logging.get_logger(__name__)

# transformers calls `cache`, from 5.24 on, what was `past_key_values` before, and reads either name in outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

if TRANSFORMERS_4:
    from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer

    class VisionTower(SiglipVisionModel):
        """The tower without the level `vision_model` of transformers 4, so that weights have the same names on 5."""

        def __init__(self, config):
            super().__init__(config)
            nested = self._modules.pop("vision_model")
            self._modules.update(nested._modules)
            self.use_head = nested.use_head

        def get_input_embeddings(self) -> nn.Module:
            return self.embeddings.patch_embedding

        forward = SiglipVisionTransformer.forward

else:
    VisionTower = SiglipVisionModel  # type: ignore[misc]


def pixel_shuffle(features: torch.Tensor, rows: int, columns: int, factor: int) -> torch.Tensor:
    """
    Merges each `factor x factor` block of patches into one token, trading sequence length for channels.

    Channels come out in the order (dy, dx, c): the patches of a block row by row, each with all its channels. This is
    the order of Idefics3, SmolVLM and InternVL. An odd grid is padded with zeros at the bottom and on the right.

    Args:
        features (`torch.Tensor` of shape `(n_images, rows * columns, channels)`): Patches, row by row.
        rows (`int`): Height of the grid of patches.
        columns (`int`): Width of the grid of patches.
        factor (`int`): Side of a block.

    Returns:
        `torch.Tensor` of shape `(n_images, ceil(rows / factor) * ceil(columns / factor), factor**2 * channels)`.

    Raises:
        ValueError: if the number of patches is not `rows * columns`.
    """
    n_images, n_patches, channels = features.shape
    if n_patches != rows * columns:
        raise ValueError(
            f"Got {n_patches} patches for each image, but a grid of {rows} x {columns} has {rows * columns}: pass all "
            "patches of the vision tower's last hidden state."
        )
    features = features.reshape(n_images, rows, columns, channels)
    features = nn.functional.pad(features, (0, 0, 0, -columns % factor, 0, -rows % factor))
    rows, columns = features.shape[1] // factor, features.shape[2] // factor
    features = features.reshape(n_images, rows, factor, columns, factor, channels)
    features = features.permute(0, 1, 3, 2, 4, 5)  # (n_images, rows, columns, dy, dx, channels)
    return features.reshape(n_images, rows * columns, factor * factor * channels)


class SiQVLProjector(nn.Module):
    """
    Pixel shuffle followed by a projection to the width of the language model.

    `config.projector_type` `"linear"` is `W x + b`, the report's projector. `"mlp"`, its future work, is
    `h + V gelu(h) + c` with `h = W x + b`.
    """

    def __init__(self, config: SiQVLConfig):
        super().__init__()
        self.factor = config.pixel_shuffle_factor
        width = config.text_config.hidden_size
        self.linear = nn.Linear(config.vision_config.hidden_size * self.factor**2, width, bias=config.projector_bias)
        self.residual = None
        if config.projector_type == "mlp":
            self.residual = nn.Sequential(nn.GELU(), nn.Linear(width, width, bias=config.projector_bias))

    def forward(self, vision_features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """
        Turns patches into tokens of the language model.

        Args:
            vision_features (`torch.Tensor` of shape `(n_images, rows * columns, vision_hidden_size)`):
                Last hidden state of the vision tower.
            rows (`int`): Height of the grid of patches.
            columns (`int`): Width of the grid of patches.

        Returns:
            `torch.Tensor` of shape `(n_images, n_tokens, text_hidden_size)`.
        """
        hidden_states = pixel_shuffle(vision_features, rows, columns, self.factor)
        if self.linear.weight.is_floating_point():  # a quantised weight takes any input type
            hidden_states = hidden_states.to(self.linear.weight.dtype)
        hidden_states = self.linear(hidden_states)
        if self.residual is not None:
            hidden_states = hidden_states + self.residual(hidden_states)
        return hidden_states


@dataclass
class SiQVLModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`SiQVLModel`]: that of the language model, and the images.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(n_images, n_tokens, text_hidden_size)`, *optional*):
            Projected image features, as they replaced the placeholders.
        image_outputs ([`BaseModelOutputWithPooling`], *optional*):
            What [`get_image_features`] returned; on transformers 5 with the tower's own hidden states and attentions, where
            these were asked for.
    """

    image_hidden_states: Optional[torch.Tensor] = None
    image_outputs: Optional[BaseModelOutputWithPooling] = None


@dataclass
class SiQVLCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`SiQVLForConditionalGeneration`]: loss, logits and states as for any causal language model, and the images.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(n_images, n_tokens, text_hidden_size)`, *optional*):
            Projected image features, as they replaced the placeholders.
        image_outputs ([`BaseModelOutputWithPooling`], *optional*):
            What [`get_image_features`] returned; on transformers 5 with the tower's own hidden states and attentions, where
            these were asked for.
    """

    image_hidden_states: Optional[torch.Tensor] = None
    image_outputs: Optional[BaseModelOutputWithPooling] = None


def scale_and_cap(logits: torch.Tensor, text_config: PretrainedConfig) -> torch.Tensor:
    """
    What a decoder's own class does to the output of its `lm_head`.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Output of the last layer.
        text_config (`PretrainedConfig`): Configuration of the decoder.

    Returns:
        `torch.Tensor` of the same shape: divided (Granite), multiplied (Cohere) or capped (Gemma 2 and 3), or as it is.
    """
    if text_config.model_type == "granite":
        return logits / text_config.logits_scaling
    if text_config.model_type in ("cohere", "cohere2"):
        return logits * text_config.logit_scale
    if text_config.model_type in ("gemma2", "gemma3_text") and text_config.final_logit_softcapping is not None:
        cap = text_config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap
    return logits


def scales_embeddings_inside(text_config: PretrainedConfig) -> bool:
    """
    Whether a decoder multiplies all `inputs_embeds` by the root of its width, as Gemma 1 and 2 do on transformers 4.

    On transformers 5, and in Gemma 3, the embedding layer does so to tokens. Images enter unscaled on both.
    """
    return TRANSFORMERS_4 and text_config.model_type in ("gemma", "gemma2")


def _layer_classes(language_model: PreTrainedModel) -> list[str]:
    """Names of the classes of the layers that are never split over devices: the tower's and the language model's."""
    present = {type(module).__name__ for module in language_model.modules()}
    return ["SiglipEncoderLayer", *sorted(present & set(language_model._no_split_modules or ()))]


def _warn_of_attention_without_cap(text_config: PretrainedConfig) -> None:
    """Says where transformers 4 leaves out Gemma 2's cap of attention scores, which transformers 5 does not."""
    capped = text_config.model_type == "gemma2" and text_config.attn_logit_softcapping is not None
    if capped and text_config._attn_implementation == "sdpa":
        logger.warning_once(
            "Gemma 2 caps its attention scores, but with attn_implementation 'sdpa' this release of transformers leaves "
            "that out, and transformers 5 does not: load with attn_implementation='eager' for equal outputs."
        )


def _checkpoint_where_it_trains(
    layer: nn.Module, checkpoint: Callable, function: Callable, hidden_states: torch.Tensor, *args
) -> Any:
    """
    Runs a layer of the vision tower, checkpointed unless there is nothing to differentiate in it.

    Before the first layer that trains autograd keeps nothing, and checkpointing would only cost. From there on it needs
    an input that requires grad, without which checkpointing with reentrant silently trains nothing.

    Args:
        layer (`nn.Module`): The layer, which tells whether it trains.
        checkpoint (`Callable`): How layers are checkpointed: called with a function and its arguments.
        function (`Callable`): The layer's own forward pass.
        hidden_states (`torch.Tensor` of shape `(n_images, n_patches, vision_hidden_size)`): The layer's input.
        args: Its further inputs.
    """
    if not hidden_states.requires_grad:
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            return function(hidden_states, *args)
        if torch.is_grad_enabled():
            hidden_states = hidden_states.detach().requires_grad_(True)
    return checkpoint(function, hidden_states, *args)


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 spreads the weights of a module over the processes."""
    # The former makes them `DTensor`s; the latter marks them.
    return any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in module.parameters())


class SiQVLPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving common to the SiQ-VL classes."""

    config_class = SiQVLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer"]  # and the layers of the language model, once it is known
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        No: all weights are initialised by transformers' own functions.

        transformers 5 passes over modules without weights of their own where a class has other functions, and with them
        over what SigLIP's attention and MLP blocks do for their layers.
        """
        return False

    def enable_input_require_grads(self) -> None:
        """
        Lets gradients flow from the language model's embeddings on, as checkpointing with reentrant needs it.

        transformers 5 would hook the vision tower's patch embedding too, so that each step would compute a frozen tower
        twice and differentiate it. A tower that trains needs no such hook: see [`_checkpoint_where_it_trains`].
        """

        def require_grad(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        # Both names are read by `disable_input_require_grads`, one by each major.
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require_grad)
        self._require_grads_hooks = [self._require_grads_hook]

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        """Switches checkpointing on or off; the vision tower's layers are checkpointed only where they train."""
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for tower in self.modules():
            if not isinstance(tower, SiglipVisionModel):
                continue
            for layer in tower.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    checkpoint = layer._gradient_checkpointing_func
                    layer._gradient_checkpointing_func = partial(_checkpoint_where_it_trains, layer, checkpoint)


class SiQVLModel(SiQVLPreTrainedModel):
    """
    Vision tower, projector and language model, without the output layer.

    Args:
        config ([`SiQVLConfig`]): The configuration of the model.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: SiQVLConfig):
        super().__init__(config)
        check_decoder(config.text_config)
        self.vision_tower = VisionTower._from_config(config.vision_config)
        self.projector = SiQVLProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self._no_split_modules = _layer_classes(self.language_model)
        _warn_of_attention_without_cap(self.language_model.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Optional[torch.Tensor] = None,
        vision_features: Optional[torch.Tensor] = None,
        **kwargs,
    ) -> Union[tuple, BaseModelOutputWithPooling]:
        """
        Encodes images, or takes what the vision tower computed for them earlier, and projects them.

        Args:
            pixel_values (`torch.Tensor` of shape `(n_images, 3, height, width)`, *optional*):
                Images from the processor. For another size than `image_size` the tower's positions are interpolated.
            vision_features (`torch.Tensor` of shape `(n_images, n_patches, vision_hidden_size)`, *optional*):
                Last hidden state of the vision tower for these images, in place of `pixel_values`. For images of
                another size, their grid is a part of the shape: `(n_images, rows, columns, vision_hidden_size)`.

        Returns:
            [`BaseModelOutputWithPooling`], or a tuple with `return_dict=False`: the tower's output as
            `last_hidden_state`, of shape `(n_images, n_patches, vision_hidden_size)`, and the image tokens as
            `pooler_output`, of shape `(n_images, n_tokens, text_hidden_size)`.

        Raises:
            ValueError: unless exactly one of the two inputs is given, with the shape that the configuration says.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError(
                "Got both or neither of pixel_values and vision_features, but images are given in one way: pass exactly one."
            )
        rows, columns = self._patch_grid(pixel_values, vision_features)
        if vision_features is None:
            size = self.config.vision_config.image_size
            interpolate = tuple(pixel_values.shape[2:]) != (size, size)
            options = {**kwargs, "interpolate_pos_encoding": interpolate, "return_dict": True}
            outputs = self.vision_tower(pixel_values=pixel_values, **options)
        else:
            if vision_features.ndim == 4:
                vision_features = vision_features.flatten(1, 2)
            outputs = BaseModelOutputWithPooling(last_hidden_state=vision_features)
        outputs.pooler_output = self.projector(outputs.last_hidden_state, rows, columns)
        return outputs

    def _patch_grid(
        self, pixel_values: Optional[torch.Tensor], vision_features: Optional[torch.Tensor]
    ) -> tuple[int, int]:
        """Rows and columns of the patches of each image; see [`get_image_features`] for the shapes."""
        size, patch = self.config.vision_config.image_size, self.config.vision_config.patch_size
        if pixel_values is None:
            rows, columns = vision_features.shape[1:3] if vision_features.ndim == 4 else (size // patch, size // patch)
            return rows, columns
        shape = tuple(pixel_values.shape)
        known = len(shape) == 4 and shape[1] == 3
        if not known or shape[2:] != (size, size) and (0 in shape[2:] or shape[2] % patch or shape[3] % patch):
            raise ValueError(
                f"pixel_values has the shape {shape}, but must be (n_images, 3, {size}, {size}), or have a height and a "
                f"width that are multiples of the patch size, {patch}: prepare images with the processor of this checkpoint."
            )
        return shape[2] // patch, shape[3] // patch

    def _tokens_per_image(self, pixel_values: Optional[torch.Tensor], vision_features: Optional[torch.Tensor]) -> int:
        """Number of image tokens of each image; see [`get_image_features`] for the shapes."""
        patch = self.config.vision_config.patch_size
        rows, columns = self._patch_grid(pixel_values, vision_features)
        return tokens_per_image(rows * patch, columns * patch, patch, self.config.pixel_shuffle_factor)

    def get_placeholder_mask(
        self,
        input_ids: Optional[torch.LongTensor],
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.Tensor:
        """
        Finds the placeholders that image features replace, and checks that there are as many of one as of the other.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; without them placeholders are recognised by their embedding.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, text_hidden_size)`): Embeddings.
            image_features (`torch.Tensor` of shape `(n_images, n_tokens, text_hidden_size)`): Projected images.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: if the counts differ.
        """
        mask = self._find_placeholders(input_ids, inputs_embeds)
        n_features = image_features.shape[0] * image_features.shape[1]
        if _is_false(mask.sum() == n_features, "Image features and image tokens do not match."):
            raise ValueError(
                f"Image features and image tokens do not match: tokens: {int(mask.sum())}, features {n_features}. Each "
                f"image needs {image_features.shape[1] or self.config.image_seq_length} placeholders: let the processor expand them, and do not "
                "truncate inside an image."
            )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _find_placeholders(
        self, input_ids: Optional[torch.LongTensor], inputs_embeds: Optional[torch.Tensor]
    ) -> torch.BoolTensor:
        """Marks image placeholders, in the shape `(batch_size, sequence_length)`."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def _check_images_given(self, input_ids: torch.LongTensor, refuse: bool) -> None:
        """Refuses placeholders, in ids of shape `(batch_size, sequence_length)`, without images; or only warns of them."""
        mask = self._find_placeholders(input_ids, None)
        if not refuse and torch.compiler.is_compiling():
            return
        if _is_false(~mask.any(), "Image features and image tokens do not match."):
            message = (
                f"Image features and image tokens do not match: tokens: {int(mask.sum())}, features 0. No images were "
                "given, so the placeholders stand for nothing: pass the pixel_values that the processor made."
            )
            if refuse:
                raise ValueError(message)
            logger.warning_once(message)

    def _zero_of_vision(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """
        A zero, of shape `()`, that depends on every trainable weight of the vision side.

        Added to a training batch without images, it leads the backward pass to the same weights on every process. A
        stage that trains the projector alone would have nothing to differentiate, and distributed training would wait
        for gradients that never come. A tower whose weights are spread over the processes runs on a blank image: they
        gather its weights together, and one of them alone would wait for ever.
        """
        vision, factor = self.config.vision_config, self.config.pixel_shuffle_factor
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        if trains or _is_sharded(self.vision_tower):
            image = inputs_embeds.new_zeros(1, 3, vision.image_size, vision.image_size)
            tokens = self.get_image_features(image, return_dict=True).pooler_output
        else:
            tokens = self.projector(inputs_embeds.new_zeros(1, factor * factor, vision.hidden_size), factor, factor)
        return 0.0 * tokens.sum()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        vision_features: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        cache: Optional[Cache] = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Union[tuple, SiQVLModelOutputWithPast]:
        """
        See [`SiQVLForConditionalGeneration.forward`] for the arguments.

        Returns:
            [`SiQVLModelOutputWithPast`], with `last_hidden_state` of shape `(batch_size, sequence_length,
            text_hidden_size)`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; if the number of placeholders
                does not fit the images; if packed rows are given in a way that would let them see each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Got both or neither of input_ids and inputs_embeds: pass exactly one.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        past_key_values = _one_cache(past_key_values, cache)
        self._check_packing(inputs_embeds.shape[0], position_ids, attention_mask, past_key_values, use_cache)

        image_features = image_outputs = None
        if pixel_values is not None or vision_features is not None:
            recorded = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            image_outputs = self.get_image_features(pixel_values, vision_features, return_dict=True, **recorded)
            image_features = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            if scales_embeddings_inside(self.config.text_config):
                image_features = image_features / self.config.text_config.hidden_size**0.5
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif input_ids is not None and input_ids.shape[1] > 1 and _is_empty(past_key_values):
            self._check_images_given(input_ids, refuse=self.training)
        first_step = image_features is None and _is_empty(past_key_values)
        if image_features is None and (self.training or first_step and _is_sharded(self.vision_tower)):
            inputs_embeds = inputs_embeds + self._zero_of_vision(inputs_embeds).to(inputs_embeds)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{**kwargs, CACHE: past_key_values, "return_dict": True},
        )
        return SiQVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: getattr(outputs, CACHE)},  # the other name costs on every step of a generation
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            image_outputs=image_outputs,
        )

    def _check_packing(
        self,
        n_rows: int,
        position_ids: Optional[torch.LongTensor],
        attention_mask: Optional[torch.Tensor],
        past_key_values: Optional[Cache],
        use_cache: Optional[bool],
    ) -> None:
        """
        Refuses packed samples that would silently attend to each other.

        Restarting `position_ids` keep the samples of a packed row apart only without a mask and a cache, and, with flash
        attention, only in a batch of one row.
        """
        if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
            return
        cached = past_key_values is not None or (self.config.text_config.use_cache if use_cache is None else use_cache)
        if attention_mask is None and not cached and n_rows == 1:
            return
        visible = torch.ones_like(position_ids, dtype=torch.bool)
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
                return  # made by the caller, who knows what it hides
            visible = attention_mask[:, -position_ids.shape[1] :].bool()
        reached = position_ids.masked_fill(~visible, -1).cummax(dim=1).values  # by the visible tokens up to each
        restarts = visible[:, 1:] & (position_ids[:, 1:] <= reached[:, :-1])
        if _is_false(~restarts.any(), "position_ids restart inside a row: the samples would see each other."):
            raise ValueError(
                "position_ids restart inside a row, but samples packed into a row would see each other in a batch of "
                f"{n_rows} rows, attention_mask {'given' if attention_mask is not None else 'None'} and "
                f"use_cache={bool(cached)}: pass one row, attention_mask=None and use_cache=False."
            )


class SiQVLForConditionalGeneration(SiQVLPreTrainedModel, GenerationMixin):
    """
    SiQ-VL with its output layer, for training and generation.

    Args:
        config ([`SiQVLConfig`]): The configuration of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SiQVLConfig):
        super().__init__(config)
        self.model = SiQVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self._no_split_modules = self.model._no_split_modules

    @classmethod
    def from_backbones(
        cls,
        vision_tower: str,
        language_model: str,
        *,
        image_token_id: int = 151655,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        projector_type: str = "linear",
        dtype: Union[str, torch.dtype] = torch.float32,
        **config_kwargs,
    ) -> "SiQVLForConditionalGeneration":
        """
        Builds a new model from two pretrained backbones; its projector has fresh weights.

        Args:
            vision_tower (`str`):
                Folder or Hub id of a `SiglipVisionModel`, or of a `SiglipModel`, whose vision part is taken. Its
                attention-pooling head is dropped.
            language_model (`str`):
                Folder or Hub id of a causal language model.
            image_token_id (`int`, defaults to 151655): Id of `<|image_pad|>` in the language model's tokenizer.
            vision_start_token_id (`int`, defaults to 151652): Id of `<|vision_start|>`.
            vision_end_token_id (`int`, defaults to 151653): Id of `<|vision_end|>`.
            projector_type (`str`, defaults to `"linear"`): See [`SiQVLConfig`].
            dtype (`str` or `torch.dtype`, defaults to `torch.float32`):
                Type of all weights; `"auto"` takes the language model's. `torch_dtype` is accepted as another name.
            config_kwargs: Further fields of [`SiQVLConfig`].

        Returns:
            [`SiQVLForConditionalGeneration`], in evaluation mode.

        Raises:
            ValueError: if a checkpoint is of another kind, or lacks weights; see [`check_decoder`].
        """
        dtype = config_kwargs.pop("torch_dtype", dtype)
        check_decoder(AutoConfig.from_pretrained(language_model))
        decoder = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
        tower = _load_vision_tower(vision_tower, decoder.dtype)
        config = SiQVLConfig(
            vision_config=tower.config,
            text_config=decoder.config,
            projector_type=projector_type,
            image_token_id=image_token_id,
            vision_start_token_id=vision_start_token_id,
            vision_end_token_id=vision_end_token_id,
            **config_kwargs,
        )
        model = cls._from_config(config, dtype=decoder.dtype)
        weights = {name.removeprefix("vision_model."): weight for name, weight in tower.state_dict().items()}
        model.model.vision_tower.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
        # Only the ids: an instruct model's sampling settings were tuned for its own answers.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(decoder.generation_config, name))
        return model.eval()

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_image_features(
        self, pixel_values: Optional[torch.Tensor] = None, vision_features: Optional[torch.Tensor] = None, **kwargs
    ) -> Union[tuple, BaseModelOutputWithPooling]:
        """See [`SiQVLModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, vision_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        vision_features: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        cache: Optional[Cache] = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Union[tuple, SiQVLCausalLMOutputWithPast]:
        """
        Replaces the placeholders by projected image features and runs the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with `config.image_seq_length` times `config.image_token_id` for each image. Samples may
                have any number of images, none included.
            pixel_values (`torch.Tensor` of shape `(n_images, 3, height, width)`, *optional*):
                All images of the batch, in the order of their placeholders; see [`get_image_features`].
            vision_features (`torch.Tensor` of shape `(n_images, n_patches, vision_hidden_size)`, *optional*):
                Last hidden state of the vision tower, in place of `pixel_values`: with a frozen tower it can be
                computed once and kept.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding, which may be on either side (for generation: on the left).
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions. Several samples may be packed into one row by restarting positions, with
                `attention_mask=None` and `use_cache=False`; the first label of each must be -100.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict, not shifted; -100 where no loss is wanted.
            use_cache (`bool`, *optional*): Whether to return keys and values.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Number of last positions, or their indices, for which logits are computed; 0 means all.
            cache (`Cache`, *optional*): `past_key_values` under the name that transformers 5.24 gave it.
            kwargs: Passed on to the language model and the loss, for instance `num_items_in_batch`.

        Returns:
            [`SiQVLCausalLMOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: see [`SiQVLModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            vision_features=vision_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, CACHE: _one_cache(past_key_values, cache), "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_and_cap(self.lm_head(outputs.last_hidden_state[:, kept, :]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return SiQVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )

    def generate(
        self,
        inputs: Optional[torch.Tensor] = None,
        generation_config: Optional[GenerationConfig] = None,
        *,
        max_thinking_tokens: Optional[int] = None,
        **kwargs,
    ):
        """
        Generates, on request with a bound on the reasoning; see [`GenerationMixin.generate`] for everything else.

        Args:
            inputs (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids of the prompts.
            generation_config (`GenerationConfig`, *optional*): May hold `max_thinking_tokens` too.
            max_thinking_tokens (`int`, *optional*):
                Most tokens of a rationale, after which `</think><answer>` follows, so that no answer is left out. Needs
                `tokenizer=processor.tokenizer`. See [`ThinkingBudgetLogitsProcessor`].
            kwargs: Inputs of the model, generation settings.

        Raises:
            ValueError: if the bound is given without a tokenizer, or `max_new_tokens` leaves no room for an answer.
        """
        if max_thinking_tokens is None:
            max_thinking_tokens = vars(generation_config or self.generation_config).get("max_thinking_tokens")
        if max_thinking_tokens is not None:
            tokenizer = kwargs.get("tokenizer")
            if tokenizer is None:
                raise ValueError(
                    f"max_thinking_tokens is {max_thinking_tokens}, but the tags are found in the text of the output: "
                    "pass tokenizer=processor.tokenizer to generate."
                )
            tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
            budget = ThinkingBudgetLogitsProcessor(tokenizer, max_thinking_tokens)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), budget])
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        vision_features: Optional[torch.Tensor] = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Adds the images whose placeholders are among the tokens that the next step reads, and no others."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        images = {"pixel_values": pixel_values, "vision_features": vision_features}
        images = {name: value for name, value in images.items() if value is not None}
        new_ids = inputs["input_ids"]
        if new_ids is None or not images:
            inputs.update(images)
            return inputs
        n_tokens = self.model._tokens_per_image(pixel_values, vision_features)
        if new_ids.shape[1] > 1 or n_tokens == 1:  # a single decoded token holds no image
            total, new = (self._images_per_sample(n_tokens, ids) for ids in (input_ids, new_ids))
            if any(new):
                inputs.update({name: _last_of_each_sample(value, total, new) for name, value in images.items()})
        return inputs

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: Optional[int] = None,
        *args,
        device: Optional[str] = None,
        **kwargs,
    ) -> LogitsProcessorList:
        """
        Adds that no image placeholder is generated, nor proposed by prompt lookup, and starts a thinking budget.

        A placeholder would stand for an image that nobody gave, in this generation and in each turn that follows. What
        the budget forces comes after everything else, which may not forbid it.
        """
        processors = super()._get_logits_processor(
            generation_config, input_ids_seq_length, *args, device=device, **kwargs
        )
        processors.insert(0, _SuppressPlaceholder(self.config.image_token_id))
        budgets = [found for found in processors if isinstance(found, ThinkingBudgetLogitsProcessor)]
        for budget in budgets:
            budget.start(input_ids_seq_length, generation_config.max_length, generation_config.eos_token_id)
        others = [found for found in processors if not isinstance(found, ThinkingBudgetLogitsProcessor)]
        return _Processors([*others, *budgets])

    def _images_per_sample(
        self, n_tokens: int, input_ids: Optional[torch.LongTensor], inputs_embeds: Optional[torch.Tensor] = None
    ) -> list[int]:
        """Number of images of `n_tokens` in each sample of ids or embeddings, `(batch_size, sequence_length, ...)`."""
        if inputs_embeds is not None:
            input_ids = None
        placeholders = self.model._find_placeholders(input_ids, inputs_embeds).sum(dim=1)
        if (placeholders % n_tokens).any():
            raise ValueError(
                f"The rows of the prompt have {placeholders.tolist()} placeholders, but each image has {n_tokens}, to be "
                "read in one step: let the processor expand them, and read no prompt in chunks (prefill_chunk_size) or from "
                "a cache that ends inside an image."
            )
        return (placeholders // n_tokens).tolist()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Optional[torch.LongTensor] = None,
        **model_kwargs,
    ) -> tuple[Optional[torch.LongTensor], dict[str, Any]]:
        """
        Repeats each sample `expand_size` times for beams or several return sequences.

        Images are flat over the batch, so the images of a sample are repeated as a group. They are encoded here, once,
        and the copies share the vision features.
        """
        pixel_values = model_kwargs.pop("pixel_values", None)
        vision_features = model_kwargs.pop("vision_features", None)
        text_alone = pixel_values is None and vision_features is None and model_kwargs.get("inputs_embeds") is None
        if text_alone and _is_empty(model_kwargs.get(CACHE)):
            self.model._check_images_given(input_ids, refuse=True)
        if expand_size > 1 and pixel_values is not None:
            grid = self.model._patch_grid(pixel_values, None)
            encoded: Any = self.get_image_features(pixel_values, return_dict=True)
            vision_features = encoded.last_hidden_state
            if grid != self.model._patch_grid(None, vision_features):
                vision_features = vision_features.unflatten(1, grid)
            pixel_values = None
        if expand_size > 1 and vision_features is not None:
            n_tokens = self.model._tokens_per_image(None, vision_features)
            counts = self._images_per_sample(n_tokens, input_ids, model_kwargs.get("inputs_embeds"))
            if sum(counts) != vision_features.shape[0]:
                raise ValueError(
                    f"Image features and image tokens do not match: the prompts have placeholders for {sum(counts)} "
                    f"images, but {vision_features.shape[0]} were given: pass every image of the prompts, in order."
                )
            groups = vision_features.split(counts)
            vision_features = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        if vision_features is not None:
            model_kwargs["vision_features"] = vision_features
        return input_ids, model_kwargs


# transformers 5 asks for the signature of remote code at each step of a generation, and finds it here at once.
SiQVLForConditionalGeneration.forward.__signature__ = inspect.signature(SiQVLForConditionalGeneration.forward)


class _Processors(LogitsProcessorList):
    """Logits processors in their order, which are not asked for their signatures at each step."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        """Takes and returns scores of shape `(batch_size, vocab_size)`."""
        if kwargs:  # which of them takes these is told by their signatures
            return super().__call__(input_ids, scores, **kwargs)
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class _SuppressPlaceholder(LogitsProcessor):
    """Forbids one token; unlike transformers' own processor for several, it does not look at the whole vocabulary."""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Takes and returns scores of shape `(batch_size, vocab_size)`."""
        allowed = scores.clone()
        allowed[..., self.token_id] = -float("inf")
        return allowed


def _is_false(condition: torch.Tensor, message: str) -> bool:
    """
    Whether a condition, a boolean of shape `()`, does not hold.

    A compiled graph cannot branch on values: there the condition becomes an assertion of the graph, a `RuntimeError`
    with the message where it does not hold.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
        return False
    return not condition


def _one_cache(past_key_values: Optional[Cache], cache: Optional[Cache]) -> Optional[Cache]:
    """The cache that was given, under the one name or the other."""
    if past_key_values is not None and cache is not None:
        raise ValueError("Got both past_key_values and cache, two names of the same: pass one of them.")
    if past_key_values is None:
        return cache
    if CACHE == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            "`past_key_values` is deprecated since transformers 5.24: pass `cache`.", FutureWarning, stacklevel=3
        )
    return past_key_values


def _is_empty(cache: Optional[Cache]) -> bool:
    """Whether a cache holds no tokens yet."""
    return cache is None or cache.get_seq_length() == 0


def _last_of_each_sample(images: torch.Tensor, total: list[int], new: list[int]) -> torch.Tensor:
    """
    Keeps the images of the tokens that a cache does not hold yet.

    Args:
        images (`torch.Tensor` of shape `(n_images, ...)`): Images, flat over the batch.
        total (`list[int]`): Images in each sample's whole sequence.
        new (`list[int]`): Images in the tokens to be read, which end the sequence.

    Returns:
        `torch.Tensor` of shape `(sum(new), ...)`, or `images` itself where they are not those of the whole sequence.
    """
    if total == new or images.shape[0] != sum(total):
        return images
    kept = [index >= count - wanted for count, wanted in zip(total, new, strict=True) for index in range(count)]
    return images[torch.tensor(kept, device=images.device)]


class _VisionPart(SiglipVisionModel):
    """A `SiglipVisionModel` that takes its part of a whole SigLIP checkpoint without complaint about the rest."""

    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_(scale|bias)$"]


def _load_vision_tower(path: str, dtype: torch.dtype) -> SiglipVisionModel:
    """Loads the vision part of a SigLIP checkpoint, and makes sure that all its weights were there."""
    model_type = AutoConfig.from_pretrained(path).model_type
    if model_type not in ("siglip", "siglip_vision_model"):
        raise ValueError(
            f"{path} is a checkpoint of type {model_type!r}, but the vision tower must be 'siglip' or "
            "'siglip_vision_model': use a SigLIP or fixed-resolution SigLIP-2 checkpoint."
        )
    tower, loading = _VisionPart.from_pretrained(
        path,
        dtype=dtype,
        output_loading_info=True,
        # transformers 5 saves the tower without the prefix that transformers 4 expects, which would load random weights.
        key_mapping={r"^(embeddings|encoder|post_layernorm|head)\.": r"vision_model.\1."},
    )
    missing = [name for name in loading["missing_keys"] if not name.removeprefix("vision_model.").startswith("head.")]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of the vision tower, {missing[0]} for one: save it again."
        )
    return tower


SiQVLModel.register_for_auto_class("AutoModel")
SiQVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "SiQVLForConditionalGeneration",
    "SiQVLModel",
    "SiQVLPreTrainedModel",
    "SiQVLProjector",
    "pixel_shuffle",
]
