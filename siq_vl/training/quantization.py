"""QLoRA: an NF4 language model under the adapter, and the way back to plain weights."""

import logging
from pathlib import Path

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.loading import KEPT_WHOLE, load_model
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.recipes import AdapterArguments

logger = logging.getLogger(__name__)

_BLOCK = 64  # weights that share one scale


def nf4_config(adapter: AdapterArguments, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings that hold the language model, and nothing else, in NF4.

    Args:
        adapter: the recipe's adapter settings.
        compute_dtype: type that the layers calculate in.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=adapter.use_bnb_nested_quant,
        llm_int8_skip_modules=list(KEPT_WHOLE),
    )


def load_nf4(
    path: str, adapter: AdapterArguments, dtype: torch.dtype, compute_dtype: torch.dtype
) -> SiQVLForConditionalGeneration:
    """Load a checkpoint with its language model in NF4.

    Args:
        path: folder or Hub id of a SiQ-VL checkpoint.
        adapter: the recipe's adapter settings.
        dtype: type of the weights that stay whole.
        compute_dtype: type that the NF4 layers calculate in.

    Raises:
        ValueError: a linear layer of the language model is too narrow for NF4's blocks, or none became NF4.
    """
    from bitsandbytes.nn import Linear4bit  # imported where NF4 is asked for: it takes a second, and looks for a GPU

    model = load_model(path, quantization_config=nf4_config(adapter, compute_dtype), dtype=dtype)
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    if not quantized or any("language_model" not in name for name, _ in quantized):
        raise ValueError(f"{path} was loaded with {len(quantized)} NF4 layers, and some are not the language model's")
    for name, module in quantized:
        if module.in_features % _BLOCK:
            raise ValueError(
                f"{name} has {module.in_features} inputs, but NF4 takes them in blocks of {_BLOCK}: use LoRA without "
                "load_in_4bit for this model"
            )
        # bitsandbytes repacks the weights for AVX512-BF16 in evaluation mode, after which training cannot go on.
        module.support_avx512bf16_for_cpu = False
    return model


def dequantized(model: PreTrainedModel) -> SiQVLForConditionalGeneration:
    """Return the function that an NF4 model computes as a model with plain float32 weights, on the CPU."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    fields = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    weights = {
        name: dequantize_4bit(weight.data, weight.quant_state).float().cpu()
        if isinstance(weight, Params4bit)
        else weight.data.float().cpu()
        for name, weight in model.named_parameters()
    }
    plain = SiQVLForConditionalGeneration(SiQVLConfig.from_dict(fields)).float()
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in plain._tied_weights_keys]
    if missing or unexpected:
        raise ValueError(f"dequantizing lost {missing} and does not know {unexpected}")
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def merge_adapter(model: PeftModel, adapter_folder: Path, *, nf4: bool) -> tuple[PreTrainedModel, str]:
    """Merge a trained adapter into its base.

    Merging is done in float32. An NF4 base is dequantized first: the merged model computes what was trained, not what
    the adapter would do to the weights before they were quantized.

    Args:
        model: the trained model; it is of no use afterwards.
        adapter_folder: the adapter as saved.
        nf4: whether it was trained on an NF4 base.

    Returns:
        The merged model, and a sentence that says what the adapter was merged into.
    """
    if not nf4:
        return model.float().merge_and_unload(), "The adapter was merged into the float32 weights it was trained on."
    base = dequantized(model.unload())
    merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    what = (
        "The adapter was trained on an NF4 base and merged into that base, dequantized to float32, not into the weights "
        "from before quantization: the merged model computes what was trained."
    )
    logger.info(what)
    return merged, what
