"""The language model in NF4 or int8 for inference, tower and projector whole."""

import pytest
import torch
from conftest import REPO_ROOT
from transformers import AutoModelForImageTextToText

from siq_vl.evaluation.generation import generate_texts
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.loading import load_checkpoint, quantized


@pytest.mark.parametrize(("bits", "layer"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_answers_as_in_full_precision(bits, layer):
    pytest.importorskip("bitsandbytes")
    full, _ = load_checkpoint(str(REPO_ROOT))
    model, processor = load_checkpoint(str(REPO_ROOT), bits)
    changed = {name for name, module in model.named_modules() if type(module).__name__ == layer}
    linear = {name for name, module in full.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed == {name for name in linear if name.startswith("model.language_model.")}
    items = held_out_items(4)[:4]
    asked = [item.messages for item in items], [list(item.images) for item in items]
    assert generate_texts(model, processor, *asked) == generate_texts(full, processor, *asked)


def test_through_auto_classes():
    pytest.importorskip("bitsandbytes")
    model = AutoModelForImageTextToText.from_pretrained(
        REPO_ROOT, trust_remote_code=True, dtype=torch.float32, quantization_config=quantized(4, torch.float32)
    )
    assert model.is_loaded_in_4bit and model.model.projector.linear.weight.dtype == torch.float32


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits is 3; it must be 4"):
        quantized(3)
