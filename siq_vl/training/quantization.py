"""QLoRA: a language model in 4 or 8 bits under the adapter, and the way back to plain weights."""

import logging
from pathlib import Path

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.loading import KEPT_WHOLE, load_model
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.arguments import ModelArguments

logger = logging.getLogger(__name__)

_BLOCK = 64  # weights that share one scale in 4 bits


def quantization_config(arguments: ModelArguments, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings that hold the language model, and nothing else, in 4 or 8 bits.

    Args:
        arguments: the recipe's model, with `load_in_4bit` or `load_in_8bit`.
        compute_dtype: type that layers in 4 bits calculate in; those in 8 bits calculate in float16.
    """
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_WHOLE))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
        bnb_4bit_quant_storage=arguments.bnb_4bit_quant_storage,
        llm_int8_skip_modules=list(KEPT_WHOLE),
    )


def load_quantized(
    path: str, arguments: ModelArguments, dtype: torch.dtype, compute_dtype: torch.dtype, **kwargs
) -> SiQVLForConditionalGeneration:
    """Load a checkpoint with its language model in 4 or 8 bits.

    Args:
        path: folder or Hub id of a SiQ-VL checkpoint.
        arguments: the recipe's model, with `load_in_4bit` or `load_in_8bit`.
        dtype: type of the weights that stay whole.
        compute_dtype: type that the quantized layers calculate in.
        kwargs: what `from_pretrained` takes.

    Raises:
        ValueError: a linear layer of the language model is too narrow for the blocks of 4 bits, or none was quantized.
    """
    # Imported where it is asked for: it takes a second, and looks for a GPU.
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = quantization_config(arguments, compute_dtype)
    model = load_model(path, quantization_config=config, dtype=dtype, **kwargs)
    quantized = []
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            quantized.append((name, module))
    if not quantized or any("language_model" not in name for name, _ in quantized):
        raise ValueError(
            f"{path} was loaded with {len(quantized)} quantized layers, and some are not the language model's"
        )
    if arguments.load_in_8bit:
        return model
    for name, module in quantized:
        if module.in_features % _BLOCK:
            raise ValueError(
                f"{name} has {module.in_features} inputs, but 4 bits take them in blocks of {_BLOCK}: use LoRA without "
                "load_in_4bit for this model"
            )
        # bitsandbytes repacks the weights for AVX512-BF16 in evaluation mode, after which training cannot go on.
        module.support_avx512bf16_for_cpu = False
    return model


def dequantized(model: PreTrainedModel) -> SiQVLForConditionalGeneration:
    """Return the function that a quantized model computes as a model with plain float32 weights, on the CPU."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params, Params4bit

    weights = {}
    for name, weight in model.named_parameters():
        if isinstance(weight, Params4bit):
            plain_weight = dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(weight, Int8Params):
            # A layer that has run keeps its scales, one a row, in its state.
            layer = model.get_submodule(name.removesuffix(".weight"))
            scales = weight.SCB if weight.SCB is not None else layer.state.SCB
            plain_weight = int8_vectorwise_dequant(weight.data, scales)
        else:
            plain_weight = weight.data
        weights[name] = plain_weight.float().cpu()

    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    plain = SiQVLForConditionalGeneration(SiQVLConfig.from_dict(fields)).float()
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    # The output layer may share the embeddings, and then has no weights of its own.
    missing = [name for name in missing if name not in plain._tied_weights_keys]
    if missing or unexpected:
        raise ValueError(f"dequantizing lost {missing} and does not know {unexpected}")
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def merge_adapter(model: PeftModel, adapter_folder: Path, arguments: ModelArguments) -> tuple[PreTrainedModel, str]:
    """Merge a trained adapter into its base.

    Merging is done in float32. A quantized base is dequantized first: the merged model computes what was trained, not
    what the adapter would do to the weights before they were quantized.

    Args:
        model: the trained model; it is of no use afterwards.
        adapter_folder: the adapter as saved.
        arguments: the recipe's model, which says what base it was trained on.

    Returns:
        The merged model, and a sentence that says what the adapter was merged into.
    """
    if not arguments.quantized:
        return model.float().merge_and_unload(), "The adapter was merged into the float32 weights it was trained on."
    base = dequantized(model.unload())
    merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    kind = "int8" if arguments.load_in_8bit else arguments.bnb_4bit_quant_type.upper()
    what = (
        f"The adapter was trained on an {kind} base and merged into that base, dequantized to float32, not into the "
        "weights from before quantization: the merged model computes what was trained."
    )
    logger.info(what)
    return merged, what
