"""Loading a checkpoint, whole and undamaged."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

# Full names: transformers 5 silently ignores the last part alone.
KEPT_WHOLE = ("model.projector", "model.vision_tower", "lm_head")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)

# What libraries raise for files that are cut off, changed by hand, or another model's.
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


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
        ValueError: the folder is there and holds no checkpoint, or neither folder nor Hub knows the path; a file of the
            checkpoint is absent, damaged or of another checkpoint.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no checkpoint (no config.json): train it first, or pass another path")
    if not folder.exists() and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ValueError(f"{path} does not exist: pass the folder of a checkpoint, or a Hub id such as name/siq-vl")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if bits is None:
        model = load_model(path).to(device)
    else:
        # Said in so many words: beside bitsandbytes' weights transformers 4 would take float16 for all others.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_model(path, quantization_config=quantized(bits, dtype), dtype=dtype, device_map={"": device})
    processor = load_processor(path)
    _check_fit(path, model, processor)
    return model.eval(), processor


def load_model(path: str, **kwargs: Any) -> SiQVLForConditionalGeneration:
    """Return the model of a checkpoint with all its weights, where `from_pretrained` would fill gaps with random ones.

    Args:
        path: a checkpoint's folder, or its id on the Hub.
        kwargs: what `SiQVLForConditionalGeneration.from_pretrained` takes.

    Raises:
        ValueError: config.json or a file of weights is absent or damaged, or they do not fit each other.
    """
    _check_config(Path(path))
    _check_weights(Path(path))
    try:
        model, loading = SiQVLForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be loaded: its config.json and its weights are damaged or not of one model; copy the files of "
            f"the checkpoint again ({_one_line(error)})"
        ) from error
    for found, meaning in (
        ("missing_keys", "lacks weights that its config.json asks for"),
        ("unexpected_keys", "holds weights that its config.json has no place for"),
    ):
        names = sorted(loading[found])
        if names:
            raise ValueError(
                f"{path} {meaning}: {len(names)}, {names[0]} for one; copy the files of the checkpoint again, or save the "
                "whole model again with `save_pretrained`"
            )
    return model


def load_processor(path: str, **kwargs: Any) -> SiQVLProcessor:
    """Return the processor of a checkpoint.

    Args:
        path: a checkpoint's folder, or its id on the Hub.
        kwargs: what `SiQVLProcessor.from_pretrained` takes.

    Raises:
        ValueError: one of its files is absent or damaged.
    """
    folder = Path(path)
    for name in PROCESSOR_FILES if folder.is_dir() else ():
        _read(folder / name)
    try:
        # transformers 5 would ask on the terminal before it reads the tokenizer of a repository that has code files.
        return SiQVLProcessor.from_pretrained(path, trust_remote_code=True, **kwargs)
    except OSError as error:  # says which file
        raise ValueError(f"{error}") from error
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: one of {', '.join(PROCESSOR_FILES)} is damaged; copy them again, or save the processor again with "
            f"`save_pretrained` ({_one_line(error)})"
        ) from error


def _read(file: Path) -> Any:
    """Contents of a text file of a checkpoint, parsed where it is JSON, which must be an object."""
    if not file.is_file():
        raise ValueError(f"{file} is not there: copy all files of the checkpoint, or save it again")
    try:
        text = file.read_text(encoding="utf-8")
        contents = json.loads(text) if file.suffix == ".json" else text
    except ValueError as error:
        raise ValueError(f"{file} is damaged: copy it again, or save the checkpoint again ({error})") from error
    if file.suffix == ".json" and not isinstance(contents, dict):
        raise ValueError(f"{file} holds a {type(contents).__name__}, but must hold an object: copy it again")
    return contents


def _check_config(folder: Path) -> None:
    """Refuse a folder whose config.json is damaged, or of another kind of model."""
    if not folder.is_dir():
        return
    model_type = _read(folder / "config.json").get("model_type")
    if model_type != "siq_vl":
        raise ValueError(
            f"{folder / 'config.json'} is of a model of type {model_type!r}, not 'siq_vl': pass another path"
        )
    if (folder / "generation_config.json").exists():
        _read(folder / "generation_config.json")


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose files of weights are absent or cut off; their headers say so."""
    if not folder.is_dir():
        return
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        places = _read(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{folder / INDEX} has no weight_map: copy it again, or save the checkpoint again")
        names = sorted(set(places.values()))
    for name in names:
        if not (folder / name).is_file():
            reason = f"which {INDEX} names" if name != WEIGHTS else "and no index of several files"
            raise ValueError(
                f"{folder / name} is not there, {reason}: copy all files of the checkpoint, or save it again with "
                "`save_pretrained`"
            )
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / name} is damaged: copy it again, or save the checkpoint again ({error})"
            ) from error


def _check_fit(path: str, model: SiQVLForConditionalGeneration, processor: SiQVLProcessor) -> None:
    """Refuse a processor that makes other inputs than the model takes: its files are another checkpoint's."""
    config = model.config
    pairs = {
        "patch_size": (processor.patch_size, config.vision_config.patch_size),
        "pixel_shuffle_factor": (processor.pixel_shuffle_factor, config.pixel_shuffle_factor),
        "image_token_id": (processor.image_token_id, config.image_token_id),
        "vision_start_token_id": (processor.vision_start_token_id, config.vision_start_token_id),
        "vision_end_token_id": (processor.vision_end_token_id, config.vision_end_token_id),
    }
    for name, (prepared, wanted) in pairs.items():
        if prepared != wanted:
            raise ValueError(
                f"{path}: {name} is {prepared} in the processor (processor_config.json, tokenizer.json) and {wanted} in "
                "config.json: copy all files from one checkpoint"
            )
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}]
    try:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: the processor cannot prepare a picture with a question, so chat_template.jinja or "
            f"preprocessor_config.json is damaged; copy them again ({_one_line(error)})"
        ) from error
    largest = int(inputs["input_ids"].max())
    if largest >= config.text_config.vocab_size:
        raise ValueError(
            f"{path}: tokenizer.json has a token of id {largest}, but the model knows {config.text_config.vocab_size}: copy "
            "all files from one checkpoint"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
