"""Recipes: one YAML a stage, parsed by `TrlParser`; every field can be overridden on the command line."""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from trl import SFTConfig, TrlParser

from siq_vl.data.mixture_config import FIGURES, FeatureArguments, MixtureConfig
from siq_vl.distill.trace_arguments import TraceArguments

logger = logging.getLogger(__name__)

REPO_ROOT = Path(__file__).resolve().parents[2]
RECIPES = REPO_ROOT / "recipes"
STAGES = ("1", "2", "3")
BATCHING = ("padded", "length_grouped", "packed")


@dataclass
class ModelArguments:
    """Where the model comes from.

    Stage 1 builds it from the two backbones; later stages start from `model_name_or_path`, by default the previous
    stage's checkpoint of the same recipe.
    """

    vision_tower: str | None = field(default=None, metadata={"help": "Backbone of stage 1: a folder or Hub id."})
    language_model: str | None = field(default=None, metadata={"help": "Backbone of stage 1: a folder or Hub id."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint that stages 2 and 3 start from."}
    )
    projector_type: str = field(default="linear", metadata={"help": "'linear' or 'mlp'."})
    pixel_shuffle_factor: int = field(default=2, metadata={"help": "Side of the block of patches merged to one token."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the frozen weights, 'float32' or 'bfloat16'; what trains is always float32."},
    )
    random_weights: bool = field(
        default=False,
        metadata={"help": "Build the full-size model with random weights, from its sizes alone: to measure, offline."},
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")


@dataclass
class AdapterArguments:
    """LoRA on the language model, optionally over an NF4 base (QLoRA); the projector trains beside it, whole.

    The vision tower is frozen unless it gets a LoRA of its own, or its last layers are unfrozen.
    """

    lora_r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scaling factor."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the LoRA branch."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={
            "help": "Linear layers of the language model that get an adapter; by default all, whatever their names."
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: hold the frozen language model in NF4 (bitsandbytes)."}
    )
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "QLoRA: quantize the scales, too."})
    vision_lora: bool = field(default=False, metadata={"help": "LoRA of the same rank on the vision tower's linears."})
    unfreeze_vision_layers: int = field(
        default=0, metadata={"help": "Train this many last layers of the vision tower, whole."}
    )

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; it must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and less than 1")
        if self.unfreeze_vision_layers < 0:
            raise ValueError(f"unfreeze_vision_layers is {self.unfreeze_vision_layers}; it must be 0 or more")
        if self.vision_lora and self.unfreeze_vision_layers:
            raise ValueError(
                f"vision_lora is set and unfreeze_vision_layers is {self.unfreeze_vision_layers}; the tower takes one of "
                "the two: drop the other"
            )


class DataArguments(MixtureConfig):
    """What stages 1 and 2 are trained on; stage 3 has `TraceArguments` beside it, and takes no sources."""


@dataclass
class RunArguments:
    """How the run goes about it: nothing here changes what is learnt, but for the effective batch size."""

    effective_batch_size: int = field(
        default=0,
        metadata={
            "help": "Samples an optimizer step, over all processes. Gradient accumulation is computed from it, and "
            "per_device_train_batch_size is the most that one device takes at once. 0: as the two say."
        },
    )
    batching: str = field(
        default="padded",
        metadata={
            "help": "'padded'; 'length_grouped': batches of rows of like length, padded; 'packed': rows packed together, "
            "with no padding. The samples of a step are the same in the first and the last."
        },
    )
    pack_tokens: int = field(
        default=2048, metadata={"help": "Packed: the most tokens of a packed row, which is one forward pass."}
    )
    pack_buffer: int = field(
        default=32,
        metadata={
            "help": "Packed: how many samples of a step a device reads at once, to be packed together. Takes the place "
            "of per_device_train_batch_size."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop before any training."})
    free_memory_steps: int = field(
        default=0, metadata={"help": "Collect garbage and empty the accelerator's cache every so many steps."}
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Let the model answer fixed held-out rows every so many steps; 0: never."}
    )
    sample_count: int = field(default=8, metadata={"help": "How many held-out rows it answers."})
    sample_tokens: int = field(default=128, metadata={"help": "The most tokens it may answer with."})
    emergence_steps: int = field(
        default=0,
        metadata={"help": "Stage 3: measure the reasoning on held-out questions every so many steps; 0: never."},
    )
    emergence_count: int = field(default=120, metadata={"help": "How many held-out questions that takes."})

    def __post_init__(self) -> None:
        for name in ("effective_batch_size", "free_memory_steps", "sample_steps", "emergence_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.batching not in BATCHING:
            raise ValueError(f"batching is {self.batching!r}; it must be one of {', '.join(BATCHING)}")
        for name in ("sample_count", "sample_tokens", "emergence_count", "pack_tokens", "pack_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class HubArguments:
    """Where the finished checkpoint is pushed; taken from the fields of `TrainingArguments` that have these names.

    Kept apart from them so that the trainer pushes nothing by itself and writes the token into no file.
    """

    push_to_hub: bool = False
    repo_id: str | None = None
    revision: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)


@dataclass
class Recipe:
    """One stage of one recipe, ready to run."""

    stage: str
    name: str
    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    training: SFTConfig
    run: RunArguments = field(default_factory=RunArguments)
    hub: HubArguments = field(default_factory=HubArguments)
    features: FeatureArguments = field(default_factory=FeatureArguments)
    traces: TraceArguments | None = None
    config: str = ""

    @property
    def title(self) -> str:
        """The recipe's name and, where it is not the stage's default, the configuration's."""
        return f"{self.name}, {self.config}" if self.config else self.name


def recipe_names() -> list[str]:
    """Return the recipes that the repo carries."""
    return sorted(path.name for path in RECIPES.iterdir() if path.is_dir())


def local_or_hub(path: str) -> str:
    """Return a folder below the working folder or the repo root where there is one, else the Hub id unchanged."""
    for candidate in (Path(path), REPO_ROOT / path):
        if candidate.is_dir():
            return str(candidate)
    return path


def parse_recipe(stages: tuple[str, ...], argv: list[str] | None = None, description: str | None = None) -> Recipe:
    """Parse `--stage`, `--recipe`, `--config` and any number of overrides.

    `--config NAME` picks one of several configurations of a stage, `stage<n>-<name>.yaml`; it has an output folder of
    its own.

    Args:
        stages: the stages that the calling script runs; with a single one, `--stage` may be left out.
        argv: the command line, `sys.argv[1:]` by default.
        description: shown by `--help`, before the fields.

    Raises:
        ValueError: unknown stage or recipe, or a field that its own check refuses.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--stage", default=stages[0] if len(stages) == 1 else None)
    chooser.add_argument("--recipe", default="tiny")
    chooser.add_argument("--config", default="")
    chosen, rest = chooser.parse_known_args(sys.argv[1:] if argv is None else argv)
    of_stage = [TraceArguments] if chosen.stage == "3" else []
    parser = TrlParser(
        [ModelArguments, AdapterArguments, DataArguments, RunArguments, FeatureArguments, SFTConfig, *of_stage],
        description=description,
    )
    if {"-h", "--help"} & set(rest):
        parser.parse_args_and_config(args=["--help"])
    if chosen.stage not in stages:
        raise ValueError(f"stage is {chosen.stage!r}; pass --stage {' or --stage '.join(stages)}")
    if chosen.recipe not in recipe_names():
        raise ValueError(
            f"recipe is {chosen.recipe!r}; it must be one of {', '.join(recipe_names())} (folders of recipes/)"
        )
    path = _stage_file(chosen.recipe, chosen.stage, chosen.config)
    if not any(argument.split("=")[0] == "--output_dir" for argument in rest):
        rest = [*rest, "--output_dir", str(stage_folder(chosen.recipe, path.stem.removeprefix("stage")))]
    if not torch.accelerator.is_available():
        rest = [*rest, "--use_cpu", "true"]  # bf16 on a machine with no accelerator has to be asked for
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            rest = [*rest, "--ddp_backend", "gloo"]
    try:
        parsed = parser.parse_args_and_config(args=["--config", str(path), *rest])
    except ValueError as error:  # what the libraries find wrong with a field is about the command line too
        raise ValueError(f"{error}: correct the field in {path.name} or on the command line") from error
    model, adapter, data, run, features, training, *others = parsed
    traces = others[0] if others else None
    if model.dtype == "bfloat16" and not training.bf16:
        raise ValueError("dtype is bfloat16 and bf16 is false: what trains is float32, so set bf16, or dtype float32")
    keep_effective_batch(training, run.effective_batch_size)
    arrange_batches(training, run)
    _check_checkpoints(training)
    _check_kernels(training)
    if traces is not None:
        _check_traces(traces, training, data, run)
    hub = _take_hub_arguments(training)
    config = path.stem.partition("-")[2]
    return Recipe(chosen.stage, chosen.recipe, model, adapter, data, training, run, hub, features, traces, config)


def _stage_file(recipe: str, stage: str, config: str) -> Path:
    """Return the YAML of a stage; `config` is one of its configurations by name, `_` being as good as `-`."""
    path = RECIPES / recipe / f"stage{stage}{'-' if config else ''}{config.replace('_', '-')}.yaml"
    if path.exists():
        return path
    if config:
        known = sorted(path.stem.partition("-")[2] for path in path.parent.glob(f"stage{stage}-*.yaml"))
        raise ValueError(
            f"config is {config!r}; stage {stage} of recipe {recipe!r} has {', '.join(known) or 'its default alone'}: pass "
            "one of these, or leave --config out"
        )
    raise ValueError(f"recipe {recipe!r} has no stage {stage}: {path.name} is missing in recipes/{recipe}")


def keep_effective_batch(training: SFTConfig, wanted: int) -> None:
    """Set batch size and gradient accumulation so that a step takes `wanted` samples over all processes.

    `per_device_train_batch_size` is lowered where all processes together would take more at once.

    Raises:
        ValueError: no whole number of accumulation steps does it.
    """
    if not wanted:
        return
    processes = training.world_size
    training.per_device_train_batch_size = min(training.per_device_train_batch_size, max(1, wanted // processes))
    at_once = training.per_device_train_batch_size * processes
    if wanted % at_once:
        raise ValueError(
            f"effective_batch_size is {wanted}, but {processes} processes x per_device_train_batch_size "
            f"{training.per_device_train_batch_size} = {at_once} samples at once do not divide it: change one of the "
            "three"
        )
    stated = training.gradient_accumulation_steps
    training.gradient_accumulation_steps = wanted // at_once
    if stated not in (1, training.gradient_accumulation_steps):
        raise ValueError(
            f"gradient_accumulation_steps is {stated}, but effective_batch_size {wanted} over {at_once} samples at once "
            f"makes {training.gradient_accumulation_steps}: pass only one of the two (--effective_batch_size 0 turns "
            "the other off)"
        )


def arrange_batches(training: SFTConfig, run: RunArguments) -> None:
    """Let a device read as many samples of a step at once as are packed together; a step takes as many as before.

    Raises:
        ValueError: TRL's own packing or transformers' grouping is asked for.
    """
    for name in ("packing", "padding_free"):
        if getattr(training, name):
            raise ValueError(
                f"{name} is true, but TRL packs text alone: use batching: packed, which packs pictures too"
            )
    grouped = getattr(training, "group_by_length", False)  # transformers 4; then 5
    if grouped or getattr(training, "train_sampling_strategy", None) == "group_by_length":
        raise ValueError(
            "group_by_length needs a column of lengths, which rows here lack: use batching: length_grouped"
        )
    if run.batching == "packed":
        share = training.per_device_train_batch_size * training.gradient_accumulation_steps
        at_once = max(size for size in range(1, min(share, run.pack_buffer) + 1) if share % size == 0)
        training.per_device_train_batch_size, training.gradient_accumulation_steps = at_once, share // at_once


def _check_checkpoints(training: SFTConfig) -> None:
    if training.save_total_limit == 1:
        raise ValueError(
            "save_total_limit is 1, which deletes the last good checkpoint before the next one is known to be whole: "
            "use 2 or more"
        )
    steps_saved = training.save_strategy == "steps" and training.save_steps >= 1
    if steps_saved and training.logging_steps >= 1 and training.save_steps % training.logging_steps:
        logger.warning(
            "save_steps %s is no multiple of logging_steps %s: after a resume, the first loss that is logged averages "
            "fewer steps than in an uninterrupted run",
            training.save_steps,
            training.logging_steps,
        )


def _check_traces(traces: TraceArguments, training: SFTConfig, data: DataArguments, run: RunArguments) -> None:
    if [source.path for source in data.sources] != [FIGURES]:
        raise ValueError("stage 3 learns from traces, not from sources: set traces and teachers instead")
    if traces.curriculum != "none" and run.batching == "length_grouped":
        raise ValueError(
            f"curriculum is {traces.curriculum!r} and batching is length_grouped, and each orders the rows: drop one of the "
            "two"
        )
    evaluates = training.eval_strategy != "no"
    if evaluates and not traces.validation_share:
        raise ValueError(
            f"eval_strategy is {training.eval_strategy.value!r} and validation_share is 0, so that there is nothing to "
            "evaluate on: set validation_share, for instance to 0.05"
        )
    if not traces.early_stopping_patience:
        return
    if not (evaluates and training.load_best_model_at_end):
        raise ValueError(
            f"early_stopping_patience is {traces.early_stopping_patience}, which takes eval_strategy, the same "
            "save_strategy, and load_best_model_at_end: set them"
        )
    # How often there was no improvement is a part of the run: it goes on with it.
    training.restore_callback_states_from_checkpoint = True


def _check_kernels(training: SFTConfig) -> None:
    if training.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel is true, but Liger has no kernels for this model type and would change nothing: drop it; "
            "the output layer is fused without it"
        )


def _take_hub_arguments(training: SFTConfig) -> HubArguments:
    taken = HubArguments(
        push_to_hub=training.push_to_hub,
        repo_id=training.hub_model_id,
        revision=training.hub_revision,
        private=training.hub_private_repo,
        token=training.hub_token,
    )
    training.push_to_hub, training.hub_token = False, None
    return taken


def backbones_of(recipe: Recipe) -> tuple[str | None, str | None]:
    """Return the vision tower and the language model of a recipe; stages 2 and 3 take those of its `stage1.yaml`."""
    model = recipe.model
    first: dict = {}
    if recipe.stage != "1" and (RECIPES / recipe.name / "stage1.yaml").exists():
        first = yaml.safe_load((RECIPES / recipe.name / "stage1.yaml").read_text(encoding="utf-8"))
    return (
        model.vision_tower or first.get("vision_tower"),
        model.language_model or first.get("language_model"),
    )


def stage_folder(recipe: str, stage: str) -> Path:
    """Return where a stage of a recipe leaves its checkpoint by default."""
    return Path("outputs") / recipe / f"stage{stage}"


def starting_checkpoint(recipe: Recipe) -> str:
    """Return the checkpoint that stage 2 or 3 starts from.

    Raises:
        ValueError: the previous stage has left none.
    """
    if recipe.model.model_name_or_path is not None:
        return local_or_hub(recipe.model.model_name_or_path)
    previous = str(int(recipe.stage) - 1)
    folder = stage_folder(recipe.name, previous)
    if not (folder / "config.json").exists():
        script = "train_sft.py"
        raise ValueError(
            f"stage {recipe.stage} starts from stage {previous}, and {folder} holds no checkpoint: run "
            f"`python {script} --stage {previous} --recipe {recipe.name}` first, or pass --model_name_or_path"
        )
    return str(folder)
