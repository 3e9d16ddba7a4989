"""Loading a checkpoint for inference."""

from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

# Full names: transformers 5 silently ignores the last part alone.
KEPT_WHOLE = ("model.projector", "model.vision_tower", "lm_head")


def quantized(bits: int, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Return the `quantization_config` that holds the language model, and nothing else, in NF4 or int8.

    Args:
        bits: 4 (NF4 with nested scales) or 8.
        dtype: type that the NF4 layers calculate in.

    Raises:
        ValueError: another number of bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it must be 4 (NF4) or 8 (int8)")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_WHOLE))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=list(KEPT_WHOLE),
    )


def load_checkpoint(path: str, bits: int | None = None) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return model (in evaluation mode, on the accelerator where there is one) and processor.

    Args:
        path: a checkpoint's folder, or its id on the Hub.
        bits: hold the language model in NF4 (4) or int8 (8), see `quantized`; needs bitsandbytes.

    Raises:
        ValueError: the folder is there and holds no checkpoint, or neither folder nor Hub knows the path.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no checkpoint (no config.json): train it first, or pass another path")
    if not folder.exists() and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ValueError(f"{path} does not exist: pass the folder of a checkpoint, or a Hub id such as name/siq-vl")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if bits is None:
        model = SiQVLForConditionalGeneration.from_pretrained(path).to(device)
    else:
        # Said in so many words: beside bitsandbytes' weights transformers 4 would take float16 for all others.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = SiQVLForConditionalGeneration.from_pretrained(
            path, quantization_config=quantized(bits, dtype), dtype=dtype, device_map={"": device}
        )
    # transformers 5 would ask on the terminal before it reads the tokenizer of a repository that has code files.
    return model.eval(), SiQVLProcessor.from_pretrained(path, trust_remote_code=True)
