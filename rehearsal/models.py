"""
Miniatures of the models: their classes, configuration keys, special tokens, chat templates and files, at a small width.

Backbones have random weights. Random teachers would write noise, of which verification keeps nothing, so their weights are
set instead: whatever they are asked, they write one rationale and one answer. Layers hand on what they are given, and the
last one looks the next token up: its feed-forward part is a table from a token to the one that follows it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, SiglipModel

from rehearsal.data import COUNT, Drawn

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
VISION_TOWER = "google/siglip2-large-patch16-512"
LANGUAGE_MODELS = {"Qwen/Qwen2.5-0.5B-Instruct": 64, "Qwen/Qwen2.5-1.5B-Instruct": 128}  # and their miniatures' widths
QWEN_SPECIAL = (
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>")
    + ("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    + ("<|image_pad|>", "<|video_pad|>")
)  # fmt: skip
QWEN_PLAIN = ("<tool_call>", "</tool_call>")
THINKING = ("<think>", "</think>")
_UNUSED = 39  # entries of the embedding without a token: the real vocabularies are padded, too
_WIDTH = 64  # of the teachers
_SURE = 8.0  # scale of the teachers' logits: no sampling setting makes them say anything else

_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
_PARTS = (
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part -%}IMAGE{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
_CHAT = (
    "{%- for message in messages -%}" + _TURN + _PARTS + "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\nOPENING' }}{%- endif -%}"
)
# Qwen2.5's own speaks first where nobody else does.
_QWEN25 = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}" + _CHAT.replace("OPENING", "")
)
_HUNYUAN = (
    "{{ '<｜hy_begin▁of▁sentence｜>' }}{%- for message in messages -%}" + _PARTS +
    "{%- if message['role'] == 'system' -%}{{ '<｜hy_place▁holder▁no▁3｜>' }}{%- elif message['role'] == 'user' -%}"
    "{{ '<｜hy_User｜>' }}{%- else -%}{{ '<｜hy_Assistant｜>' }}{%- endif -%}{%- endfor -%}"
)  # fmt: skip


def _vocabulary(special: Sequence[str], plain: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that has read the miniatures' texts."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    drawn = [Drawn("vocabulary", index) for index in range(8)]
    texts = [f"{each.caption}\n{each.question}" for each in drawn]
    texts += [
        "system\nYou are a helpful assistant.\nuser\nassistant\nThink step by step, then answer with a single word."
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Write a tokenizer's files in the form in which they are published."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    model = saved["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    added = {}
    for token in saved["added_tokens"]:
        added[str(token["id"])] = {name: value for name, value in token.items() if name != "id"}
    _write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, **settings},
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_vision_tower(folder: Path) -> None:
    """SigLIP-2 of fixed resolution: both towers, the real picture and patch size."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", "image_size": 512, "patch_size": 16, **small}
    text = {"model_type": "siglip_text_model", "vocab_size": 320, "max_position_embeddings": 64, **small}
    torch.manual_seed(0)
    model = SiglipModel(AutoConfig.for_model("siglip", vision_config=vision, text_config=text))
    model.save_pretrained(folder)
    config = {"model_type": "siglip", "initializer_factor": 1.0, "text_config": text, "vision_config": vision}
    _write_json(folder / "config.json", config)  # as published: no architectures, and only what is not a default
    pictures = {
        "do_resize": True,
        "size": {"height": 512, "width": 512},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "do_convert_rgb": None,
    }
    _write_json(folder / "preprocessor_config.json", pictures)


def write_language_model(folder: Path, width: int) -> None:
    """Qwen2.5-Instruct: embeddings tied, the chat template within tokenizer_config.json."""
    tokenizer = _vocabulary(QWEN_SPECIAL, QWEN_PLAIN)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(QWEN_SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "model_max_length": 131072,
        "chat_template": _QWEN25,
    }
    _write_tokenizer(folder, tokenizer, settings)
    ids = {name: tokenizer.token_to_id(token) for name, token in (("bos", "<|endoftext|>"), ("eos", "<|im_end|>"))}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size() + _UNUSED,
    }
    made = AutoConfig.for_model(**{name: value for name, value in config.items() if name != "torch_dtype"})
    torch.manual_seed(width)
    AutoModelForCausalLM.from_config(made).to(torch.bfloat16).save_pretrained(folder)
    _write_json(folder / "config.json", config)
    sampling = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": ids["bos"], "pad_token_id": ids["bos"], "eos_token_id": [ids["eos"], ids["bos"]], **sampling},
    )


def _sayings(rationale: Sequence[str], answer: str = str(COUNT)) -> list[str]:
    """Return the pieces of a teacher's reply behind `<think>`, each a token of its own."""
    return [*rationale, "</think>", f"<answer>{answer}</answer>"]


def _speak(model: PreTrainedModel, said: Sequence[int], beginnings: Sequence[int]) -> None:
    """Set the weights of a model so that it writes some tokens, one after the other, whatever it was asked.

    Args:
        model: of any family whose decoder has Llama's kind of feed-forward part.
        said: ids of the tokens, the end of turn last.
        beginnings: ids of the tokens after which the first of them comes.
    """
    text = model.get_decoder() if hasattr(model, "get_decoder") else model.model.language_model
    embedding = text.get_input_embeddings().weight
    follows = [(before, said[0]) for before in beginnings] + list(zip(said, said[1:], strict=False))
    spoken = list(dict.fromkeys([*beginnings, *said]))
    with torch.no_grad():
        for layer in text.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # The tokens that are spoken have directions of their own; all others share what is left.
        embedding[:, : len(spoken)] = 0
        for place, token in enumerate(spoken):
            embedding[token] = 0
            embedding[token, place] = 1
        table = text.layers[-1].mlp
        table.gate_proj.weight.zero_()
        table.up_proj.weight.zero_()
        for unit, (before, after) in enumerate(follows):
            table.gate_proj.weight[unit, spoken.index(before)] = 1
            table.up_proj.weight[unit, spoken.index(before)] = 1
            table.down_proj.weight[spoken.index(after), unit] = 1
        text.norm.weight.fill_(_SURE)


def _save_teacher(folder: Path, config: Any, said: Sequence[int], beginnings: Sequence[int], generation: dict) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    _speak(model, said, beginnings)
    model.to(torch.bfloat16).save_pretrained(folder)
    _write_json(folder / "generation_config.json", generation)


def _qwen3_tokenizer(folder: Path, pieces: Sequence[str], named: Mapping[str, str]) -> Tokenizer:
    """Write a tokenizer of the Qwen3 kind; `named` are special tokens that are attributes of it, too."""
    tokenizer = _vocabulary([*QWEN_SPECIAL, *named.values()], [*QWEN_PLAIN, *THINKING, *pieces])
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "additional_special_tokens": list(QWEN_SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 262144,
        **({"extra_special_tokens": dict(named), **named} if named else {}),
    }
    _write_tokenizer(folder, tokenizer, settings)
    return tokenizer


def _small_text(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32768,
        "vocab_size": tokenizer.get_vocab_size() + _UNUSED,
        **more,
    }


def write_qwen3_vl(folder: Path, thinking: bool) -> None:
    """Qwen3-VL: the Thinking model's prompt ends with the opening tag, the Instruct model writes it itself."""
    rationale = [
        "I look at the picture from left to right.",
        " I count the things in it: one, then another one.",
        " 1 + 1 = 2.",
    ]
    if thinking:
        rationale = [
            "So, what is in this picture? I see some things side by side.",
            " One is here, and one is there.",
            " That makes 2.",
        ]
    pieces = _sayings(rationale)
    tokenizer = _qwen3_tokenizer(folder, [*rationale, pieces[-1]], {})
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    template = _CHAT.replace("IMAGE", image).replace("OPENING", "<think>\\n" if thinking else "")
    _write_json(folder / "chat_template.json", {"chat_template": template})
    id_of = tokenizer.token_to_id
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    if TRANSFORMERS_4:
        turning: dict[str, Any] = {"rope_scaling": rope, "rope_theta": 5000000}
    else:
        turning = {"rope_parameters": {**rope, "rope_theta": 5000000}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": _WIDTH,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0, 1],
    }
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=_small_text(tokenizer, tie_word_embeddings=True, rms_norm_eps=1e-06, **turning),
        vision_config=vision,
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    said = [id_of(piece) for piece in (pieces if thinking else ["<think>", *pieces])]
    sampling = {"temperature": 1.0, "top_p": 0.95} if thinking else {"temperature": 0.7, "top_p": 0.8}
    ends = [id_of("<|im_end|>"), id_of("<|endoftext|>")]
    generation = {"do_sample": True, "top_k": 20, "eos_token_id": ends, "pad_token_id": ends[1], **sampling}
    _save_teacher(folder, config, [*said, ends[0]], [id_of("Ċ")], generation)
    pictures = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    _write_json(folder / "preprocessor_config.json", pictures)
    films = {**pictures, "video_processor_type": "Qwen3VLVideoProcessor"}
    _write_json(folder / "video_preprocessor_config.json", films)


def write_internvl(folder: Path) -> None:
    """InternVL3.5 in the form that the Auto classes load; pictures are cropped to patches unless told otherwise."""
    rationale = [
        "The chart is read first.",
        " It has a part on the left, and a second part beside it.",
        " Together there are 2.",
    ]
    pieces = _sayings(rationale)
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _qwen3_tokenizer(folder, [*rationale, pieces[-1]], named)
    template = _CHAT.replace("IMAGE", "{{ '<IMG_CONTEXT>\\n' }}").replace("OPENING", "")
    (folder / "chat_template.jinja").write_text(template)
    id_of = tokenizer.token_to_id
    config = AutoConfig.for_model(
        "internvl",
        text_config={"model_type": "qwen3", **_small_text(tokenizer, tie_word_embeddings=True)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        image_token_id=id_of("<IMG_CONTEXT>"),
        image_seq_length=256,
        downsample_ratio=0.5,
    )
    said = [id_of(piece) for piece in ("<think>", *pieces, "<|im_end|>")]
    generation = {"eos_token_id": said[-1], "pad_token_id": id_of("<|endoftext|>")}
    _save_teacher(folder, config, said, [id_of("Ċ")], generation)
    pictures = {
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "size": {"height": 448, "width": 448},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
    }
    _write_json(folder / "preprocessor_config.json", pictures)
    _write_json(
        folder / "video_preprocessor_config.json", {**pictures, "video_processor_type": "InternVLVideoProcessor"}
    )
    _write_json(folder / "processor_config.json", {"image_seq_length": 256, "processor_class": "InternVLProcessor"})


def write_internvl_chat(folder: Path) -> None:
    """InternVL3.5 in its first form, code of its own and a type that no Auto class knows: what has to be refused."""
    folder.mkdir(parents=True, exist_ok=True)
    code = {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    }
    _write_json(
        folder / "config.json",
        {"architectures": ["InternVLChatModel"], "auto_map": code, "model_type": "internvl_chat"},
    )
    _write_tokenizer(folder, _vocabulary(QWEN_SPECIAL, ()), {"tokenizer_class": "Qwen2Tokenizer"})


def write_hunyuan(folder: Path) -> None:
    """HunyuanOCR: transformers 5 alone knows its class; for 4 there is its configuration, which 4 has to refuse."""
    rationale = [
        "First the text of the picture is read line by line.",
        " Then what was asked for is counted.",
        " The result is 2.",
    ]
    pieces = _sayings(rationale)
    named = {
        "image_token": "<｜hy_place▁holder▁no▁102｜>",
        "image_start_token": "<｜hy_place▁holder▁no▁100｜>",
        "image_end_token": "<｜hy_place▁holder▁no▁101｜>",
    }
    begin, user, end = "<｜hy_begin▁of▁sentence｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"
    special = [begin, "<｜hy_▁pad▁｜>", user, end, "<｜hy_place▁holder▁no▁3｜>", *named.values()]
    tokenizer = _vocabulary(special, [*THINKING, *rationale, pieces[-1]])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": "<｜hy_▁pad▁｜>",
        "model_max_length": 32768,
        "extra_special_tokens": named,
        **named,
    }
    _write_tokenizer(folder, tokenizer, settings)
    image = f"{named['image_start_token']}{named['image_token']}{named['image_end_token']}"
    (folder / "chat_template.jinja").write_text(_HUNYUAN.replace("IMAGE", image))
    pictures = {
        "min_pixels": 512 * 512,
        "max_pixels": 2048 * 2048,
        "patch_size": 16,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "image_processor_type": "HunYuanVLImageProcessor",
        "processor_class": "HunYuanVLProcessor",
    }
    _write_json(folder / "preprocessor_config.json", pictures)
    _write_json(folder / "processor_config.json", {"processor_class": "HunYuanVLProcessor"})
    if TRANSFORMERS_4:
        config = {"architectures": ["HunYuanVLForConditionalGeneration"], "model_type": "hunyuan_vl"}
        _write_json(folder / "config.json", config)
        return
    id_of = tokenizer.token_to_id
    turning = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    made = AutoConfig.for_model(
        "hunyuan_vl",
        text_config=_small_text(
            tokenizer,
            rope_parameters=turning,
            pad_token_id=id_of("<｜hy_▁pad▁｜>"),
            bos_token_id=id_of(begin),
            eos_token_id=id_of(end),
            tie_word_embeddings=True,
        ),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 16,
            "out_hidden_size": _WIDTH,
            "text_hidden_size": _WIDTH,
        },
        image_token_id=id_of(named["image_token"]),
        im_start_id=id_of(named["image_start_token"]),
        im_end_id=id_of(named["image_end_token"]),
    )
    said = [id_of(piece) for piece in ("<think>", *pieces, end)]
    generation = {"do_sample": True, "top_k": 1, "eos_token_id": said[-1], "pad_token_id": id_of("<｜hy_▁pad▁｜>")}
    _save_teacher(folder, made, said, [id_of(user)], generation)


TEACHERS = {
    "Qwen/Qwen3-VL-2B-Instruct": lambda folder: write_qwen3_vl(folder, thinking=False),
    "Qwen/Qwen3-VL-2B-Thinking": lambda folder: write_qwen3_vl(folder, thinking=True),
    "OpenGVLab/InternVL3_5-2B-HF": write_internvl,
    "OpenGVLab/InternVL3_5-2B": write_internvl_chat,
    "tencent/HunyuanOCR": write_hunyuan,
}


def write_models(folder: Path, ids: Sequence[str] | None = None) -> None:
    """Write the miniatures of models below `folder/models`.

    Args:
        folder: of the rehearsal's Hub.
        ids: which; all by default.
    """
    writers = {VISION_TOWER: write_vision_tower}
    for id, width in LANGUAGE_MODELS.items():
        writers[id] = lambda path, width=width: write_language_model(path, width)
    writers |= TEACHERS
    for id, write in writers.items():
        if ids is None or id in ids:
            path = folder / "models" / id
            path.mkdir(parents=True, exist_ok=True)
            write(path)
            (path / "README.md").write_text("A miniature.\n")
