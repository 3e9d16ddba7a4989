"""Loading a checkpoint for inference."""

from pathlib import Path

import torch

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor


def load_checkpoint(path: str) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return model (in evaluation mode, on the accelerator where there is one) and processor.

    Args:
        path: a checkpoint's folder, or its id on the Hub.

    Raises:
        ValueError: the folder is there and holds no checkpoint, or neither folder nor Hub knows the path.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no checkpoint (no config.json): train it first, or pass another path")
    if not folder.exists() and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ValueError(f"{path} does not exist: pass the folder of a checkpoint, or a Hub id such as name/siq-vl")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = SiQVLForConditionalGeneration.from_pretrained(path).to(device)
    # transformers 5 would ask on the terminal before it reads the tokenizer of a repository that has code files.
    return model.eval(), SiQVLProcessor.from_pretrained(path, trust_remote_code=True)
