"""What FSDP and DeepSpeed need: models that are whole where they are made, and where they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig


@contextmanager
def whole_weights(training: SFTConfig) -> Iterator[None]:
    """Let models that are made here be whole in this process; ZeRO-3 shards them when the trainer starts.

    Told of ZeRO-3, transformers shards each weight as it is made, by all processes together: a tower and a language
    model that are loaded apart cannot be joined from shards, nor one process alone make a model to save. A compact
    model fits a machine's memory once a process.
    """
    plugin = training.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


@contextmanager
def outermost_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let a model generate under FSDP2, whichever of its modules is called for it.

    FSDP2 gathers the weights of the outermost module, those of no layer, when that module is called; PEFT generates with
    the model inside it.

    Args:
        model: as the trainer wrapped it.
        accelerator: the trainer's.
    """
    if not accelerator.is_fsdp2:
        yield
        return
    # Which module is the outermost FSDP2 finds out in the first forward pass.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device), use_cache=False)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
