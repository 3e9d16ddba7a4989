"""What FSDP2 and DeepSpeed need: models that are whole where they are made, and where they are saved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.recipes import Recipe
from siq_vl.training.stages import freeze_for_stage

_GATHERS = "stage3_gather_16bit_weights_on_model_save"  # DeepSpeed's name for what a whole checkpoint takes


def is_sharded(trainer: SFTTrainer) -> bool:
    """Whether the weights are spread over the processes, by FSDP or ZeRO-3."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def check_engine(trainer: SFTTrainer, recipe: Recipe) -> None:
    """Refuse what the engine of a run cannot do, before its first step.

    Raises:
        ValueError: a quantized language model with sharded weights, or ZeRO-3 that cannot save whole weights.
    """
    if not is_sharded(trainer):
        return
    if recipe.model.quantized:
        flag, kind = "load_in_4bit", recipe.model.bnb_4bit_quant_type.upper()
        if recipe.model.load_in_8bit:
            flag, kind = "load_in_8bit", "int8"
        raise ValueError(
            f"{flag} is set, but FSDP and ZeRO-3 cannot shard {kind} weights here: use accelerate_configs/ddp.yaml or "
            f"zero2.yaml, or drop {flag}"
        )
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and not plugin.deepspeed_config["zero_optimization"].get(_GATHERS):
        raise ValueError(
            f"{_GATHERS} is not set under zero_optimization of the DeepSpeed configuration, and a stage ends with a whole "
            "checkpoint: set it to true (in an accelerate configuration: zero3_save_16bit_model)"
        )


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


def whole_model(trainer: SFTTrainer, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """Return the trained model with all its weights; only the first process has them where they are sharded."""
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if not is_sharded(trainer):
        return model
    weights = accelerator.get_state_dict(trainer.model_wrapped)  # every process takes part
    return rebuild(model, recipe, weights) if accelerator.is_main_process else model


def rebuild(
    model: PreTrainedModel | PeftModel, recipe: Recipe, weights: Mapping[str, torch.Tensor]
) -> PreTrainedModel | PeftModel:
    """Return a whole copy of a sharded model, on the CPU, from its gathered weights."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with whole_weights(recipe.training):
        whole = SiQVLForConditionalGeneration(base.config)
    peft_config = freeze_for_stage(whole, recipe.stage, recipe.model)
    if peft_config is not None:
        whole = get_peft_model(whole, peft_config)
    whole.load_state_dict(weights)
    return whole
