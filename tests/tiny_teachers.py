"""Tiny teachers of the real classes, random weights, saved as folders that the Auto classes load; no torchvision needed."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

V5 = not transformers.__version__.startswith("4.")
_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}IMAGE{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def _tokenizer(named: dict[str, str], tokenizer_class: type = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; `named` are special tokens that are attributes of it, too."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer_class(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", extra_special_tokens=named
    )


def _save(folder: Path, config, tokenizer, image_processor, placeholder: str, processor: dict) -> Path:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", placeholder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def qwen3_vl(folder: Path) -> Path:
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig

    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    # On transformers 4 the processor insists on its own tokenizer class.
    tokenizer_class = PreTrainedTokenizerFast if V5 else transformers.Qwen2TokenizerFast
    tokenizer = _tokenizer({f"{name}_token": f"<|{name}|>" for name in names}, tokenizer_class)
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            **_TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            **({"rope_parameters": {**rope, "rope_theta": 1e4}} if V5 else {"rope_scaling": rope, "rope_theta": 1e4}),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
        tie_word_embeddings=True,
    )
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = Qwen2VLImageProcessor(patch_size=8, temporal_patch_size=2, merge_size=2, size=pixels)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    return _save(folder, config, tokenizer, images, placeholder, {"processor_class": "Qwen3VLProcessor"})


def internvl(folder: Path) -> Path:
    from transformers import GotOcr2ImageProcessor, InternVLConfig

    tokenizer = _tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_TEXT, "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    return _save(folder, config, tokenizer, images, "<IMG_CONTEXT>", processor)


def hunyuan_vl(folder: Path) -> Path:
    from transformers import HunYuanVLConfig, HunYuanVLImageProcessorPil

    tokenizer = _tokenizer({"image_token": "<pic>", "image_start_token": "<pic_s>", "image_end_token": "<pic_e>"})
    config = HunYuanVLConfig(
        text_config={
            **_TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]},
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 32,
            "text_hidden_size": 32,
            "max_image_size": 64,
            "min_image_size": 16,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<pic>"),
        im_start_id=tokenizer.convert_tokens_to_ids("<pic_s>"),
        im_end_id=tokenizer.convert_tokens_to_ids("<pic_e>"),
    )
    images = HunYuanVLImageProcessorPil(patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})
    return _save(folder, config, tokenizer, images, "<pic_s><pic><pic_e>", {"processor_class": "HunYuanVLProcessor"})


BUILDERS = {"qwen3_vl": qwen3_vl, "internvl": internvl, **({"hunyuan_vl": hunyuan_vl} if V5 else {})}
