"""
SiQ-VL checkpoints as ONNX sessions, the three that onnxruntime and transformers.js know of Idefics3-like models.

    vision_encoder         pixel_values -> image_features: tower, pixel shuffle and projector
    embed_tokens           input_ids -> inputs_embeds
    decoder_model_merged   inputs_embeds, attention_mask, position_ids, past_key_values.* -> logits, present.*

Sizes of batch, picture, sequence and cache are open. transformers.js reads the folder as an Idefics3 checkpoint; as the
projector lies inside the vision encoder, with its bias, any projector is held exactly.
"""

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.export.idefics3 import IDEFICS3_TOKENS, idefics3_config, idefics3_processor, read_json, write_json
from siq_vl.export.templates import portable_template, sliding_window, special_token_texts
from siq_vl.modeling_siq_vl import CACHE, SiQVLForConditionalGeneration, scale_and_cap, scales_embeddings_inside
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)

VISION, EMBEDDINGS, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
SESSIONS = (VISION, EMBEDDINGS, DECODER)
# What transformers.js appends to a session's name for each of its `dtype`s.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}
# A protobuf file holds 2 GiB; weights of larger models go into a file beside it.
_LARGEST_FILE = 2**31 - 2**27
_OPSET = 20


class VisionEncoder(nn.Module):
    """Tower and projector, for pictures of any size in whole patches.

    transformers.js sends the pictures of each sample in an axis of their own.
    """

    def __init__(self, model: SiQVLForConditionalGeneration):
        super().__init__()
        self.tower: Any = model.vision_tower
        self.projector = model.model.projector
        self.scale = 1.0
        if scales_embeddings_inside(model.config.text_config):
            self.scale = model.config.text_config.hidden_size**-0.5

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Takes `(batch_size, num_images, 3, height, width)`; returns `(batch_size * num_images, n_tokens, text_width)`."""
        patches = self.tower.embeddings.patch_embedding(pixel_values.flatten(0, 1))  # (n_images, width, rows, columns)
        rows, columns = patches.shape[2:]
        hidden_states = (patches + self._positions(rows, columns)).flatten(2).transpose(1, 2)
        hidden_states = self.tower.encoder(inputs_embeds=hidden_states).last_hidden_state
        hidden_states = self.tower.post_layernorm(hidden_states)
        grid = hidden_states.unflatten(1, (rows, columns))
        grid = _padded(_padded(grid, 1, self.projector.factor), 2, self.projector.factor)
        tokens = self.projector(grid.flatten(1, 2), grid.shape[1], grid.shape[2])
        return tokens * self.scale

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        """The positions of a grid, `(1, width, rows, columns)`; interpolation leaves those of the tower's own size as they are."""
        table = self.tower.embeddings.position_embedding.weight
        side = round(table.shape[0] ** 0.5)
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        return nn.functional.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)


class TokenEmbeddings(nn.Module):
    """The table of the tokens."""

    def __init__(self, model: SiQVLForConditionalGeneration):
        super().__init__()
        self.table = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Takes `(batch_size, sequence_length)`; returns `(batch_size, sequence_length, text_width)`."""
        return self.table(input_ids)


class MergedDecoder(nn.Module):
    """Language model and output layer: the same session reads the prompt, with an empty cache, and each token after it.

    Args:
        model: the model, whose language model computes its attention eagerly from here on.
        attention: whether to return where the tokens looked, too.
    """

    def __init__(self, model: SiQVLForConditionalGeneration, attention: bool):
        super().__init__()
        self.language_model: Any = model.language_model
        self.lm_head = model.lm_head
        self.text_config = model.config.text_config
        self.attention = attention
        language_model: Any = model.language_model
        language_model.set_attn_implementation("eager")

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        num_logits_to_keep: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, ...]:
        """Reads tokens after those that the cache holds.

        Args:
            inputs_embeds: of shape `(batch_size, sequence_length, text_width)`.
            attention_mask: of shape `(batch_size, total_sequence_length)`, those of the cache included; 0 for padding.
            position_ids: of shape `(batch_size, sequence_length)`.
            num_logits_to_keep: of shape `()`; 0 means the logits of all tokens.
            past_key_values: keys and values of each layer, `(batch_size, n_heads, past_sequence_length, head_width)`.

        Returns:
            Logits, the attention where it is asked for, `(batch_size, sequence_length, total_sequence_length)`, the mean
            over layers and heads, and each layer's keys and values.
        """
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, layer)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=_causal_mask(attention_mask, inputs_embeds),
            position_ids=position_ids,
            use_cache=True,
            output_attentions=self.attention,
            **{CACHE: cache},
        )
        kept = _last(outputs.last_hidden_state, num_logits_to_keep)
        results = [scale_and_cap(self.lm_head(kept), self.text_config)]
        if self.attention:
            over_heads = [layer.mean(dim=1) for layer in outputs.attentions]
            results.append(torch.stack(over_heads).mean(dim=0))
        for layer in cache.layers:
            results += [layer.keys, layer.values]
        return tuple(results)


def _padded(grid: torch.Tensor, axis: int, factor: int) -> torch.Tensor:
    """Pad an axis of a grid with zeros up to a multiple of the factor, in operations that any length goes through."""
    length = grid.shape[axis]
    blocks = (length + factor - 1) // factor  # of what is positive: ONNX divides integers towards zero
    places = torch.arange(blocks * factor)
    inside = (places < length).to(grid.dtype).reshape([-1 if place == axis else 1 for place in range(4)])
    return grid.index_select(axis, places.clamp(max=length - 1)) * inside


def _causal_mask(attention_mask: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """The mask that is added to the attention scores, `(batch_size, 1, sequence_length, total_sequence_length)`."""
    new, total = inputs_embeds.shape[1], attention_mask.shape[1]
    own_places = torch.arange(total - new, total)[:, None]
    visible = (torch.arange(total)[None] <= own_places)[None, None] & attention_mask[:, None, None].bool()
    return torch.where(visible, 0.0, torch.finfo(inputs_embeds.dtype).min).to(inputs_embeds.dtype)


def _last(hidden_states: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The last `count` tokens, or all for 0, which is what ONNX's `Slice` makes of a start of minus `count`."""
    batch_size, length, width = hidden_states.shape
    ends = torch.tensor([torch.iinfo(torch.int64).max])
    inputs = (hidden_states, -count.reshape(1), ends, torch.tensor([1]))
    return torch.onnx.ops.symbolic("Slice", inputs, dtype=hidden_states.dtype, shape=(batch_size, length, width))


def export_onnx(
    model: SiQVLForConditionalGeneration,
    processor: SiQVLProcessor,
    folder: Path,
    kinds: Sequence[str] = tuple(SUFFIXES),
    attention: bool = False,
) -> None:
    """Write a model as ONNX sessions, with all that transformers.js needs beside them.

    Args:
        model: on the CPU in float32; its language model computes its attention eagerly from here on.
        processor: its processor.
        folder: where to write.
        kinds: what the weights are held in, see `SUFFIXES`; the fp32 sessions are written in any case.
        attention: let the decoder return where the tokens looked, as an output `attention`, too.

    Raises:
        ValueError: an unknown kind, or a model that the sessions cannot hold.
    """
    unknown = sorted(set(kinds) - set(SUFFIXES))
    if unknown:
        raise ValueError(f"kinds has {unknown[0]!r}, but must be among {', '.join(SUFFIXES)}: choose from these")
    check_expressible(model, processor)
    sessions = Path(folder) / "onnx"
    sessions.mkdir(parents=True, exist_ok=True)
    with_data_file = []
    traces = {VISION: partial(_vision, model), EMBEDDINGS: partial(_embeddings, model)}
    traces[DECODER] = partial(_decoder, model, attention)
    for name, trace in traces.items():
        whole = sessions / f"{name}.onnx"
        proto = trace()
        logger.info("%s: %d operations", name, len(proto.graph.node))
        _save(proto, whole)
        del proto
        for kind in kinds:
            if kind != "fp32":
                _save(_CONVERSIONS[kind](whole), sessions / f"{name}{SUFFIXES[kind]}.onnx")
        with_data_file += [path.name for path in sessions.glob(f"{name}*.onnx") if _data_file(path).exists()]
    _write_files(model.config, processor, Path(folder), with_data_file)
    model.generation_config.save_pretrained(folder)
    _suppress_placeholder(Path(folder) / "generation_config.json", model.config.image_token_id)


def check_expressible(model: SiQVLForConditionalGeneration, processor: SiQVLProcessor) -> None:
    """Refuse what the sessions have no place for.

    Raises:
        ValueError: weights that are not float32, a cache that forgets, or pictures that transformers.js would cut into
            other tiles.
    """
    types = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    if types != {"float32"}:
        raise ValueError(
            f"The model's weights are of type {', '.join(sorted(types))}, but sessions are made of float32 weights, of "
            "which the smaller kinds are computed: load it without quantisation and with dtype=torch.float32."
        )
    text_config = model.config.text_config
    if window := sliding_window(text_config):
        raise ValueError(
            f"The language model is of type {text_config.model_type!r} and attends to the last {window} tokens in some "
            "layers, but the exported decoder attends to all of them in every layer: only checkpoints without a sliding "
            "window can be exported."
        )
    if processor.max_tiles != 1:
        raise ValueError(
            f"The processor cuts pictures into up to {processor.max_tiles} tiles, but transformers.js cuts tiles in a way "
            "of its own: export with a processor of max_tiles=1. The sessions take tiles as pictures of their own."
        )


def _vision(model: SiQVLForConditionalGeneration) -> onnx.ModelProto:
    """The vision encoder, traced with pictures that are neither square nor of the tower's size."""
    patch = model.config.vision_config.patch_size
    example = torch.zeros(2, 3, 3, 3 * patch, 5 * patch)
    open_axes = {0: Dim("batch_size"), 1: Dim("num_images"), 3: Dim.DYNAMIC, 4: Dim.DYNAMIC}
    proto = _traced(VisionEncoder(model), (example,), (open_axes,), ["pixel_values"], ["image_features"])
    _name_axes(proto, {"pixel_values": {3: "height", 4: "width"}, "image_features": {0: "n_images", 1: "n_tokens"}})
    return proto


def _embeddings(model: SiQVLForConditionalGeneration) -> onnx.ModelProto:
    open_axes = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    example = torch.zeros(2, 3, dtype=torch.int64)
    return _traced(TokenEmbeddings(model), (example,), (open_axes,), ["input_ids"], ["inputs_embeds"])


def _decoder(model: SiQVLForConditionalGeneration, attention: bool) -> onnx.ModelProto:
    """The decoder, traced with a batch of two, five tokens in the cache and three new ones."""
    text_config = model.config.text_config
    layers, heads = text_config.num_hidden_layers, text_config.num_key_value_heads
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    batch, new, past = 2, 3, 5
    cached = [tuple(torch.zeros(2, batch, heads, past, head_width)) for _ in range(layers)]
    examples = (
        torch.zeros(batch, new, text_config.hidden_size),
        torch.ones(batch, past + new, dtype=torch.int64),
        torch.arange(past, past + new).repeat(batch, 1),
        torch.tensor(1),
        cached,
    )
    batch_size, length, total = Dim("batch_size"), Dim("sequence_length"), Dim("total_sequence_length")
    cache_axes = {0: batch_size, 2: Dim("past_sequence_length")}
    open_axes = (
        {0: batch_size, 1: length},
        {0: batch_size, 1: total},
        {0: batch_size, 1: length},
        None,
        [(cache_axes, cache_axes)] * layers,
    )
    inputs = ["inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep"]
    outputs = ["logits"]
    if attention:
        outputs.append("attention")
    for layer in range(layers):
        inputs += [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        outputs += [f"present.{layer}.key", f"present.{layer}.value"]
    proto = _traced(MergedDecoder(model, attention), examples, open_axes, inputs, outputs)
    axes = {name: {2: "total_sequence_length"} for name in outputs if name != "logits"}
    _name_axes(proto, {**axes, "logits": {1: "n_logits"}})
    return proto


def _traced(
    module: nn.Module, examples: tuple, open_axes: tuple, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of axes that have one name because they are of one length
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            dynamic_shapes=open_axes,
            input_names=inputs,
            output_names=outputs,
            opset_version=_OPSET,
            verbose=False,
        )
    return program.model_proto


def _name_axes(proto: onnx.ModelProto, names: Mapping[str, Mapping[int, str]]) -> None:
    """Name the open axes of inputs and outputs; what lies between, engines infer better than the tracer notes it."""
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in names.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name


def _to_fp16(path: Path) -> onnx.ModelProto:
    """Inputs, outputs and the cache stay float32, so that the kinds can be exchanged."""
    return convert_float_to_float16(onnx.load(path), keep_io_types=True)


def _to_int8(path: Path) -> onnx.ModelProto:
    """Weights in int8 by channel, activations as they come: what onnxruntime calls dynamic quantisation."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "int8.onnx"
        quantize_dynamic(
            path,
            made,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=_data_file(path).exists(),
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(made)


def _to_q4(path: Path) -> onnx.ModelProto:
    """Weights in 4 bits, in blocks of 32 with a scale each; activations stay float32."""
    quantizer = MatMulNBitsQuantizer(
        onnx.load(path), bits=4, block_size=32, is_symmetric=True, op_types_to_quantize=("MatMul", "Gather")
    )
    quantizer.process()
    return quantizer.model.model


_CONVERSIONS = {"fp16": _to_fp16, "int8": _to_int8, "q4": _to_q4}


def _data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}_data")


def _save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a session; the weights of one that is too large for a protobuf file go into a file beside it."""
    path.unlink(missing_ok=True)
    _data_file(path).unlink(missing_ok=True)
    if sum(len(weight.raw_data) for weight in proto.graph.initializer) < _LARGEST_FILE:
        onnx.save_model(proto, path)
        return
    onnx.save_model(proto, path, save_as_external_data=True, location=_data_file(path).name, size_threshold=1024)


def _write_files(config: SiQVLConfig, processor: SiQVLProcessor, folder: Path, with_data_file: list[str]) -> None:
    """Write what transformers.js reads beside the sessions: configuration, tokenizer with template, and processor."""
    native = idefics3_processor(processor)
    special_tokens = special_token_texts(processor.tokenizer)
    template = portable_template(native.chat_template, [*special_tokens, *IDEFICS3_TOKENS.values()])
    native.tokenizer.chat_template = None
    native.tokenizer.save_pretrained(folder)
    fields = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**fields, "chat_template": template})
    fields = {**idefics3_config(config).to_dict(), "architectures": ["Idefics3ForConditionalGeneration"]}
    fields["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(with_data_file, True)}
    write_json(folder / "config.json", fields)
    ours = processor.image_processor
    picture = {
        "processor_class": "Idefics3Processor",
        "image_processor_type": "Idefics3ImageProcessor",
        "do_convert_rgb": True,
        "do_image_splitting": False,
        "do_resize": True,
        "size": {"height": ours.size["height"], "width": ours.size["width"]},
        "max_image_size": {"longest_edge": ours.size["height"]},
        "resample": int(ours.resample),
        "do_rescale": ours.do_rescale,
        "rescale_factor": ours.rescale_factor,
        "do_normalize": ours.do_normalize,
        "image_mean": list(ours.image_mean),
        "image_std": list(ours.image_std),
    }
    write_json(folder / "preprocessor_config.json", picture)
    fields = {"processor_class": "Idefics3Processor", "image_seq_len": processor.image_seq_length}
    write_json(folder / "processor_config.json", fields)


def _suppress_placeholder(path: Path, image_token_id: int) -> None:
    """Forbid the image placeholder in generated text, as SiQ-VL's own `generate` does."""
    write_json(path, {**read_json(path), "suppress_tokens": [image_token_id]})
