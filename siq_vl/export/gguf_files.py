"""
SiQ-VL checkpoints as GGUF files for llama.cpp: the language model, and the picture side as an `mmproj` of the LFM2 type.

llama.cpp's LFM2 picture side is a SigLIP tower, a pixel shuffle in SiQ-VL's channel order, and two linear layers with a
GELU between them. One linear layer with its bias is held in these exactly: the first layer computes `W x + b + K`, with a
K so large that every value is at least 10 for every picture, where llama.cpp's GELU returns its input as it is; the second
takes K off again. K comes from the tower's last layer norm, which bounds what the projector can be given, see `shift`.

What llama.cpp does otherwise, and no file can change: it keeps a picture's aspect ratio, resizes bilinearly, and looks up
its GELU in a table of half precision. So outputs are SiQ-VL's for square pictures, best of the tower's own size; other
pictures are to be resized to that square before, as SiQ-VL does.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from siq_vl.export.quantize_q4_k import BLOCK, quantize_q4_k
from siq_vl.export.templates import portable_template, sliding_window, spaced_template, special_token_texts
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

logger = logging.getLogger(__name__)

KINDS = ("f32", "f16", "q8_0", "q4_k")
_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_k": GGMLQuantizationType.Q4_K,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S,
}
# The names that llama.cpp writes around a picture of the LFM2 type.
LFM2_TOKENS = {"<|vision_start|>": "<|image_start|>", "<|vision_end|>": "<|image_end|>"}
# From here on llama.cpp's GELU is the identity.
_GELU_IS_IDENTITY = 10.0
# The regular expressions by which tokenizers cut text into words, and what llama.cpp calls them.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OWN_WORDS = r" ?[\p{L}-]+| ?\p{N}+| ?[^\s\p{L}\p{N}-]+|\s+(?!\S)|\s+"
# llama.cpp has no counterpart of our own. Where no token lies across the words of Bloom's, which are longer, they lead to
# the same tokens: merges were learnt within our words, so none joins two of them.
_BLOOM_WORDS = re.compile(r" ?[^(\s|.,!?…。，、।۔،)]+")
_OWN_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Replace", "pattern": {"String": "\n"}, "content": "\n "},
        {"type": "Prepend", "prepend": " "},
    ],
}


def export_gguf(
    model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, folder: Path, kinds: Sequence[str] = KINDS
) -> None:
    """Write a model as `model-<kind>.gguf` for each kind, `mmproj-f32.gguf`, `mmproj-f16.gguf` and a `Modelfile` for Ollama.

    Args:
        model: in float32, with a Qwen2 language model and a linear projector.
        processor: its processor.
        folder: where to write.
        kinds: what the language model's weights are held in, see `KINDS`.

    Raises:
        ValueError: an unknown kind, or a model that llama.cpp cannot compute.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds has {unknown[0]!r}, but must be among {', '.join(KINDS)}: choose from these")
    check_expressible(model, processor)
    words = words_of(processor.tokenizer)
    template = llama_template(processor)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("f32", "f16"):
        _write_picture_side(model, processor, folder / f"mmproj-{kind}.gguf", kind)
    for kind in kinds:
        _write_language_model(model, processor, words, template, folder / f"model-{kind}.gguf", kind)
    (folder / "Modelfile").write_text(modelfile(processor, kinds[-1]), encoding="utf-8")


def check_expressible(model: SiQVLForConditionalGeneration, processor: SiQVLProcessor) -> None:
    """Refuse what llama.cpp's LFM2 picture side or its Qwen2 compute otherwise.

    Raises:
        ValueError: another language model or projector, scaled positions, pictures in tiles or otherwise prepared than by
            a mean and a standard deviation.
    """
    config, images = model.config, processor.image_processor
    text_config = config.text_config.to_dict()
    rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
    side = config.vision_config.image_size
    rules: list[tuple[str, Any, list, str]] = [
        ("text_config.model_type", config.text_config.model_type, ["qwen2"], "the language model must be a Qwen2"),
        ("the kind of rotary positions", rope.get("rope_type", "default"), ["default"], "they must not be scaled"),
        ("sliding_window", sliding_window(config.text_config), [None], "every layer must attend to all tokens"),
        ("projector_type", config.projector_type, ["linear"], "LFM2's two layers hold one linear layer, no residual"),
        ("max_tiles", processor.max_tiles, [1], "llama.cpp cuts tiles in a way of its own"),
        ("rescale_factor", round(255 * images.rescale_factor, 6), [1.0], "llama.cpp divides pixels by 255"),
        (
            "hidden_act of the tower",
            config.vision_config.hidden_act,
            ["gelu_pytorch_tanh"],
            "LFM2's tower has this one",
        ),
        ("size", (images.size["height"], images.size["width"]), [(side, side)], "pictures must have the tower's size"),
    ]
    for name, value, allowed, rule in rules:
        if value not in allowed:
            raise ValueError(
                f"{name} is {value!r}, but {rule} ({allowed[0]!r}) for llama.cpp to compute the same: only such checkpoints "
                "can be exported."
            )
    if config.pixel_shuffle_factor < 2:
        raise ValueError(
            f"pixel_shuffle_factor is {config.pixel_shuffle_factor}, but LFM2 merges at least 2 x 2 patches: only "
            "checkpoints with a factor of 2 or more can be exported."
        )


@torch.no_grad()
def shift(model: SiQVLForConditionalGeneration) -> float:
    """Return a K that lifts every value that the projector can take to where a GELU is the identity.

    The tower ends in a layer norm, whose output before its weight and bias has a norm of at most the root of its width.
    So by Cauchy and Schwarz no value of `W x + b` is larger than the sum, over the patches of a block, of
    `|w * weight| sqrt(width) + |w . bias|`, plus `|b|`.
    """
    tower: Any = model.vision_tower
    norm, linear = tower.post_layernorm, model.model.projector.linear
    width = norm.weight.shape[0]
    by_patch = linear.weight.double().reshape(linear.weight.shape[0], -1, width)  # (text_width, factor**2, width)
    bound = (by_patch * norm.weight.double()).norm(dim=2).sum(dim=1) * width**0.5
    bound += (by_patch @ norm.bias.double()).abs().sum(dim=1)
    if linear.bias is not None:
        bound += linear.bias.double().abs()
    return math.ceil(float(bound.max()) + _GELU_IS_IDENTITY)


def words_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what llama.cpp calls the way in which a tokenizer cuts text into words.

    Raises:
        ValueError: the tokenizer is no byte-level BPE, or llama.cpp knows no way that leads to the same tokens.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cutter = fields["model"], fields["pre_tokenizer"] or {}
    steps = cutter.get("pretokenizers", [cutter])
    if model["type"] == "BPE" and steps[-1].get("type") == "ByteLevel":
        patterns = [step["pattern"].get("Regex") for step in steps[:-1] if step.get("type") == "Split"]
        if len(steps) == 1 and steps[-1].get("use_regex", True):
            return "gpt-2"
        if patterns == [_QWEN2_WORDS]:
            return "qwen2"
        if patterns == [_OWN_WORDS] and not _across_words(model):
            return "bloom"
    raise ValueError(
        f"The tokenizer is of type {model['type']!r} and cuts text by {json.dumps(cutter)[:300]}, for which llama.cpp has no "
        "counterpart: only checkpoints with a byte-level BPE that cuts as GPT-2's, Qwen2's or SiQ-VL's own can be exported."
    )


def _across_words(model: dict) -> list[str]:
    """The merged tokens that lie across the words that Bloom's tokenizer makes."""
    from_letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found = []
    for first, second in model["merges"]:
        text = bytes(from_letters[letter] for letter in first + second).decode("utf-8", errors="replace")
        word = _BLOOM_WORDS.search(text)
        if word is not None and word.group() != text:
            found.append(first + second)
    return found


def llama_template(processor: SiQVLProcessor) -> str:
    """Return the chat template for llama.cpp, which writes a marker such as `<__media__>` for a picture.

    Raises:
        ValueError: the tokenizer rewrites text before it cuts it, in a way that the template cannot take over.
    """
    tokenizer, template = processor.tokenizer, processor.chat_template
    normalizer = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]
    special_tokens = [*special_token_texts(tokenizer), *LFM2_TOKENS.values()]
    if normalizer is None or normalizer == {"type": "NFC"}:
        return portable_template(template, special_tokens)
    if normalizer != _OWN_NORMALIZER or "macro plain(text)" not in template:
        raise ValueError(
            f"The tokenizer rewrites text by {json.dumps(normalizer)[:300]}, but llama.cpp does not: only checkpoints with "
            "SiQ-VL's chat template and a normalizer that is NFC, absent or SiQ-VL's own can be exported."
        )
    return spaced_template(special_tokens)


def modelfile(processor: SiQVLProcessor, kind: str) -> str:
    """Return a Modelfile for Ollama, whose templates are written in Go's language."""
    spaced = json.loads(processor.tokenizer.backend_tokenizer.to_str())["normalizer"] == _OWN_NORMALIZER
    space = " " if spaced else ""
    turns = f"{{{{ range .Messages }}}}<|im_start|>{space}{{{{ .Role }}}}\n{space}{{{{ .Content }}}}<|im_end|>{space}\n{space}{{{{ end }}}}"
    return (
        f"FROM ./model-{kind}.gguf\nFROM ./mmproj-f16.gguf\n"
        f'TEMPLATE """{turns}<|im_start|>{space}assistant\n{space}"""\n'
        "PARAMETER stop <|im_end|>\nPARAMETER temperature 0\n"
    )


def _write_picture_side(model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, path: Path, kind: str) -> None:
    config, images = model.config, processor.image_processor
    vision = config.vision_config
    writer = GGUFWriter(path, "clip")
    writer.add_name("SiQ-VL")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_clip_projector_type("lfm2")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(_by_colour(images.image_mean))
    writer.add_vision_image_std(_by_colour(images.image_std))
    writer.add_vision_projector_scale_factor(config.pixel_shuffle_factor)
    writer.add_vision_use_gelu(True)
    for name, weight in _tower_weights(model).items():
        _add(writer, name, weight, kind)
    linear, lift = model.model.projector.linear, shift(model)
    width = config.text_config.hidden_size
    bias = torch.zeros(width) if linear.bias is None else linear.bias.detach()
    logger.info("the projector's values are lifted by %d, which rounds them to %.1g at most", lift, lift * 2.0**-24)
    _add(writer, "mm.1.weight", linear.weight, kind)
    _add(writer, "mm.1.bias", bias + lift, "f32")
    _add(writer, "mm.2.weight", torch.eye(width), "f32")  # in half precision it would round the lifted values
    _add(writer, "mm.2.bias", torch.full((width,), -float(lift)), "f32")
    _finish(writer)


def _tower_weights(model: SiQVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    tower: Any = model.vision_tower
    weights = {
        "v.patch_embd.weight": tower.embeddings.patch_embedding.weight,
        "v.patch_embd.bias": tower.embeddings.patch_embedding.bias,
        "v.position_embd.weight": tower.embeddings.position_embedding.weight,
        "v.post_ln.weight": tower.post_layernorm.weight,
        "v.post_ln.bias": tower.post_layernorm.bias,
    }
    for place, layer in enumerate(tower.encoder.layers):
        modules = {
            "ln1": layer.layer_norm1,
            "attn_q": layer.self_attn.q_proj,
            "attn_k": layer.self_attn.k_proj,
            "attn_v": layer.self_attn.v_proj,
            "attn_out": layer.self_attn.out_proj,
            "ln2": layer.layer_norm2,
            "ffn_up": layer.mlp.fc1,
            "ffn_down": layer.mlp.fc2,
        }
        for name, module in modules.items():
            weights[f"v.blk.{place}.{name}.weight"] = module.weight
            weights[f"v.blk.{place}.{name}.bias"] = module.bias
    return weights


def _write_language_model(
    model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, words: str, template: str, path: Path, kind: str
) -> None:
    text = model.config.text_config
    fields = text.to_dict()
    writer = GGUFWriter(path, "qwen2")
    writer.add_name("SiQ-VL")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    theta = fields.get("rope_theta") or (fields.get("rope_parameters") or {})["rope_theta"]
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    _add_tokenizer(writer, model, processor.tokenizer, words)
    writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, text.num_hidden_layers)
    for name, weight in model.language_model.state_dict().items():
        _add(writer, names.get_name(f"model.{name}", (".weight", ".bias")), weight, kind)
    if not model.config.tie_word_embeddings:
        _add(writer, "output.weight", model.lm_head.weight, kind)
    _finish(writer)


def _add_tokenizer(
    writer: GGUFWriter, model: SiQVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, words: str
) -> None:
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(model.config.text_config.vocab_size):
        token = by_id.get(index, f"[PAD{index}]")
        tokens.append(LFM2_TOKENS.get(token, token))
        if index not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif index not in added:
            types.append(gguf.TokenType.NORMAL)
        elif added[index].special:
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in fields["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)


def _add(writer: GGUFWriter, name: str, weight: torch.Tensor, kind: str) -> None:
    """Add a tensor; vectors stay in float32, and the embeddings of a model in 4 bits get 8."""
    values = weight.detach().float().numpy()
    type_ = _TYPES[kind]
    if values.ndim == 1 or name == "v.position_embd.weight":
        type_ = GGMLQuantizationType.F32
    elif type_ == GGMLQuantizationType.Q4_K and name in ("token_embd.weight", "output.weight"):
        type_ = GGMLQuantizationType.Q8_0
    elif type_ == GGMLQuantizationType.Q4_K and values.shape[-1] % BLOCK:
        type_ = GGMLQuantizationType.Q5_0  # what llama.cpp itself takes for rows of other lengths
    data = quantize_q4_k(values) if type_ == GGMLQuantizationType.Q4_K else gguf.quantize(values, type_)
    writer.add_tensor(name, data, raw_dtype=type_)


def _by_colour(value: float | Sequence[float]) -> list[float]:
    return [float(value)] * 3 if isinstance(value, int | float) else [float(one) for one in value]


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
