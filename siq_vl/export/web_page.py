"""The page with no server: a static folder with the model, the runtime and everything else that a browser needs."""

import json
import shutil
from pathlib import Path

from PIL import Image

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.export.idefics3 import IDEFICS3_TOKENS, read_json
from siq_vl.export.onnx_sessions import SESSIONS, SUFFIXES
from siq_vl.page.examples import held_out_examples
from siq_vl.processing_siq_vl import SiQVLProcessor

REPO_ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = REPO_ROOT / "web"
_MODULES = SOURCES / "node_modules"
# What the page takes of each library, and its name there.
_LIBRARIES = {
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs": "ort.wasm.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs": "ort.webgpu.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.js",
    "@huggingface/jinja/dist/index.js": "jinja.js",
}
_PAGE = ("index.html", "page.js", "parts.js", "picture.js", "worker.js")
_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_SPACE = """---
title: SiQ-VL
sdk: static
pinned: false
---

A model that reasons about pictures, in the browser: nothing is sent anywhere. Any static server serves this folder.
"""


def build_page(
    config: SiQVLConfig, processor: SiQVLProcessor, exported: Path, folder: Path, kind: str, max_new_tokens: int
) -> None:
    """Write the page.

    Args:
        config: the checkpoint's.
        processor: the checkpoint's.
        exported: what `export_onnx` wrote of it, with `attention`.
        folder: where to write.
        kind: which sessions the page reads, see `SUFFIXES`.
        max_new_tokens: bound on reasoning and answer together.

    Raises:
        ValueError: the libraries are not there, or pictures are resized by a filter that the page does not have.
    """
    missing = [name for name in _LIBRARIES if not (_MODULES / name).exists()]
    if missing:
        raise ValueError(
            f"{_MODULES / missing[0]} is not there: run `npm ci --ignore-scripts` in {SOURCES.name}/ first"
        )
    settings = page_settings(config, processor, exported, max_new_tokens)
    for part in ("lib", "model", "examples"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in _PAGE:
        shutil.copy(SOURCES / name, folder / name)
    styles = [SOURCES / "base.css", REPO_ROOT / "siq_vl" / "page" / "style.css"]
    # The card looks as in app.py; what only this page has comes last, so that it counts.
    card, page = styles[1].read_text(encoding="utf-8"), styles[0].read_text(encoding="utf-8")
    (folder / "style.css").write_text(card.partition("/* Gradio's own parts. */")[0] + page, encoding="utf-8")
    for source, name in _LIBRARIES.items():
        shutil.copy(_MODULES / source, folder / "lib" / name)
    for name in SESSIONS:
        shutil.copy(exported / "onnx" / f"{name}{SUFFIXES[kind]}.onnx", folder / "model" / f"{name}.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / name, folder / "model" / name)
    _write(folder / "model" / "settings.json", settings)
    _write_examples(folder / "examples")
    (folder / "README.md").write_text(_SPACE, encoding="utf-8")


def page_settings(config: SiQVLConfig, processor: SiQVLProcessor, exported: Path, max_new_tokens: int) -> dict:
    """Return what the page has to know of a checkpoint: its tokens, and how it prepares pictures."""
    images = processor.image_processor
    if images.resample not in _FILTERS:
        raise ValueError(
            f"resample is {images.resample!r}, but the page resizes by {', '.join(_FILTERS.values())} alone: export a "
            "checkpoint whose processor resizes pictures by one of these."
        )
    side = images.size["height"]
    tokens_a_side = -(-(side // processor.patch_size) // processor.pixel_shuffle_factor)
    generation = read_json(exported / "generation_config.json")
    end = generation["eos_token_id"]
    around = [IDEFICS3_TOKENS["<|vision_start|>"], IDEFICS3_TOKENS["<|vision_end|>"]]
    placeholder = IDEFICS3_TOKENS["<|image_pad|>"]
    return {
        "picture": {
            "side": side,
            "rows": tokens_a_side,
            "columns": tokens_a_side,
            "filter": _FILTERS[images.resample],
            "rescale": images.rescale_factor,
            "mean": list(images.image_mean),
            "std": list(images.image_std),
        },
        "picture_token": placeholder,
        "picture_text": around[0] + placeholder * processor.image_seq_length + around[1],
        "image_token_id": config.image_token_id,
        "suppressed": generation["suppress_tokens"],
        "end": [end] if isinstance(end, int) else end,
        "longest": config.text_config.max_position_embeddings,
        "max_new_tokens": max_new_tokens,
    }


def _write_examples(folder: Path) -> None:
    entries = []
    for place, drawn in enumerate(held_out_examples()):
        drawn.image.save(folder / f"{place}.png")
        entries.append({"image": f"{place}.png", "question": drawn.question.text})
    _write(folder / "examples.json", entries)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
