"""What each stage freezes and trains, in one place."""

import logging

from peft import LoraConfig, PeftConfig
from torch import nn

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.arguments import LINEARS, STAGES, ModelArguments

logger = logging.getLogger(__name__)

_VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PARTS = ("vision_tower", "projector", "language_model")


def freeze_for_stage(model: SiQVLForConditionalGeneration, stage: str, arguments: ModelArguments) -> PeftConfig | None:
    """Freeze everything that a stage does not train.

    Stage 1 trains the projector alone. Stages 2 and 3 train the projector, whole, and LoRA on the language model's
    linear layers. The vision tower is frozen throughout, unless the recipe gives it a LoRA or unfreezes its last
    layers; its LayerNorm at the end trains with them.

    Args:
        model: the model, whose `requires_grad` flags are set.
        stage: "1", "2" or "3".
        arguments: LoRA settings of stages 2 and 3, and what of the tower trains.

    Returns:
        The PEFT config to hand to `SFTTrainer`; None in stage 1.

    Raises:
        ValueError: unknown stage, or settings that this model or stage has no place for.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; it must be one of {', '.join(STAGES)}")
    if stage == "1" and (arguments.load_in_4bit or arguments.vision_lora):
        raise ValueError("load_in_4bit and vision_lora go with LoRA, which stages 2 and 3 train: drop them in stage 1")
    for name in ("load_in_8bit", "use_rslora", "use_dora"):
        if stage == "1" and getattr(arguments, name):
            raise ValueError(f"{name} goes with LoRA, which stages 2 and 3 train: drop it in stage 1")
    whole = ["projector", *_last_vision_layers(model, arguments.unfreeze_vision_layers)]
    model.requires_grad_(False)
    for name in whole:
        model.model.get_submodule(name).requires_grad_(True)
    if stage == "1":
        return None
    # Regular expressions over full names: bare layer names would also match the vision tower's.
    names = _target_names(model, arguments.lora_target_modules)
    targets = rf".*\.language_model\..*\.({'|'.join(names)})"
    if arguments.vision_lora:
        targets = rf"({targets}|.*\.vision_tower\.encoder\..*\.({'|'.join(_VISION_LINEARS)}))"
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        target_modules=targets,
        modules_to_save=whole,  # what trains whole without being named here would be missing from the saved adapter
        task_type="CAUSAL_LM",
    )


def _target_names(model: SiQVLForConditionalGeneration, names: list[str]) -> list[str]:
    """Names of the language model's linear layers that get an adapter.

    The default means all of them: where a decoder has other linear layers than the default's seven, such as fused
    ones, it is their names that are returned.

    Args:
        model: the model.
        names: what the recipe asks for.

    Raises:
        ValueError: the recipe names something else than the default, which the language model has not.
    """
    present = set()
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            present.add(name.rpartition(".")[2])
    if set(names) == present:
        return names
    if sorted(names) == sorted(LINEARS):
        logger.info("LoRA on every linear layer of the language model: %s", ", ".join(sorted(present)))
        return sorted(present)
    unknown = sorted(set(names) - present)
    if unknown:
        raise ValueError(
            f"lora_target_modules has {', '.join(unknown)}, but the linear layers of this "
            f"{model.config.text_config.model_type} are {', '.join(sorted(present))}: name some of these, or leave "
            "lora_target_modules out for all"
        )
    return names


def _last_vision_layers(model: SiQVLForConditionalGeneration, count: int) -> list[str]:
    """Names, below `model.model`, of the tower's last layers."""
    if not count:
        return []
    depth = model.config.vision_config.num_hidden_layers
    if count > depth:
        raise ValueError(
            f"unfreeze_vision_layers is {count}, but the vision tower has {depth} layers: ask for at most {depth}"
        )
    layers = [f"vision_tower.encoder.layers.{index}" for index in range(depth - count, depth)]
    return [*layers, "vision_tower.post_layernorm"]


def count_parameters(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Return the trained and the frozen parameters of a model, by part.

    The frozen twin that PEFT keeps of a module that trains whole is not counted. NF4 weights count one by one, though
    two of them share a byte.
    """
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        part = _part_of(name)
        counts = frozen
        if parameter.requires_grad:
            counts = trained
        # What bitsandbytes packs knows the shape that it had; other parameters have no such attribute.
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel()
        if state is not None:
            size = state.shape.numel()
        counts[part] = counts.get(part, 0) + size
    return trained, frozen


def _part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to, or its own name where it is of none."""
    if "lora_" in name:
        return "LoRA"
    for part in PARTS:
        if f".{part}." in f".{name}":
            return part
    return name


def log_parameters(model: nn.Module) -> None:
    """Log what trains and what is frozen, part by part."""
    trained, frozen = count_parameters(model)
    total = sum(trained.values()) + sum(frozen.values())
    share = 100 * sum(trained.values()) / total
    logger.info("trains %s: %.2f%% of %s", _counts(trained), share, f"{total:,}")
    logger.info("frozen %s", _counts(frozen))


def _counts(parts: dict[str, int]) -> str:
    return ", ".join(f"{part} {count:,}" for part, count in sorted(parts.items()))
