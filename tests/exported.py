"""What the tests of exports share: the shipped checkpoint, its exports, and questions with PyTorch's own answers.

The exporters need requirements-export.txt. Without it these tests are skipped, and say so; with `SIQ_VL_NEED_EXPORT=1`, as
`make test-export` and `make test-gguf` set it, they fail.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import REPO_ROOT

from siq_vl.evaluation.generation import rendered
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.items import Item
from siq_vl.loading import load_checkpoint
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

NEEDED = os.environ.get("SIQ_VL_NEED_EXPORT") == "1"


def need(*packages: str) -> None:
    """Skips the module that calls it where a package is not installed, unless the exports have to be tested."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing and not NEEDED:
        pytest.skip(f"{missing[0]} is not installed: pip install -r requirements-export.txt", allow_module_level=True)


@dataclass(frozen=True)
class Shipped:
    """The shipped checkpoint, questions that no training showed, and its own greedy outputs, special tokens left out."""

    model: SiQVLForConditionalGeneration
    processor: SiQVLProcessor
    items: list[Item]
    outputs: list[str]

    def inputs(self, item: Item) -> dict[str, torch.Tensor]:
        text = rendered(self.processor, item.messages, {})
        return dict(self.processor(images=list(item.images), text=text, return_tensors="pt"))

    def write(self, folder: Path) -> list[Path]:
        """Writes the pictures as files."""
        paths = []
        for place, item in enumerate(self.items):
            paths.append(folder / f"{place}.png")
            item.image.save(paths[-1])
        return paths


@cache
def shipped(count: int) -> Shipped:
    model, processor = load_checkpoint(str(REPO_ROOT))
    items = [item for item in held_out_items(count) if item.group == "held out"]
    outputs = []
    for item in items:
        text = rendered(processor, item.messages, {})
        inputs = processor(images=list(item.images), text=text, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        outputs += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Shipped(model, processor, items, outputs)


@cache
def shipped_onnx(folder: Path) -> Path:
    """The shipped checkpoint as ONNX sessions of every kind, with the attention that the page shows; made once."""
    from siq_vl.export.onnx_sessions import export_onnx

    model, processor = load_checkpoint(str(REPO_ROOT))  # of its own: the export changes how attention is computed
    export_onnx(model, processor, folder, attention=True)
    return folder
