"""What each stage freezes and trains, in one place."""

import logging

from peft import LoraConfig, PeftConfig

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.recipes import STAGES, AdapterArguments

logger = logging.getLogger(__name__)


def freeze_for_stage(model: SiQVLForConditionalGeneration, stage: str, adapter: AdapterArguments) -> PeftConfig | None:
    """Freeze everything that a stage does not train.

    Stage 1 trains the projector alone. Stages 2 and 3 train the projector, whole, and LoRA on the language model's
    linear layers. The vision tower is frozen throughout.

    Args:
        model: the model, whose `requires_grad` flags are set.
        stage: "1", "2" or "3".
        adapter: LoRA settings of stages 2 and 3.

    Returns:
        The PEFT config to hand to `SFTTrainer`; None in stage 1.

    Raises:
        ValueError: unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; it must be one of {', '.join(STAGES)}")
    model.requires_grad_(False)
    model.model.projector.requires_grad_(True)
    if stage == "1":
        return None
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        # A regular expression over full names: bare layer names would also match the vision tower's.
        target_modules=rf".*\.language_model\..*\.({'|'.join(adapter.lora_target_modules)})",
        modules_to_save=["projector"],
        task_type="CAUSAL_LM",
    )


def log_parameters(model) -> None:
    """Log what trains and what is frozen, part by part."""
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = (
            "LoRA"
            if "lora_" in name
            else next((p for p in ("vision_tower", "projector", "language_model") if p in name), name)
        )
        counts = trained if parameter.requires_grad else frozen
        counts[part] = counts.get(part, 0) + parameter.numel()
    total = sum(trained.values()) + sum(frozen.values())
    share = 100 * sum(trained.values()) / total
    logger.info("trains %s: %.2f%% of %s", _counts(trained), share, f"{total:,}")
    logger.info("frozen %s", _counts(frozen))


def _counts(parts: dict[str, int]) -> str:
    return ", ".join(f"{part} {count:,}" for part, count in sorted(parts.items()))
