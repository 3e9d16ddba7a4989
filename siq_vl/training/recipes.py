"""Recipes: one YAML a stage, parsed by `TrlParser`; every field can be overridden on the command line."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import SFTConfig, TrlParser

from siq_vl.data.mixtures import MixtureConfig

REPO_ROOT = Path(__file__).resolve().parents[2]
RECIPES = REPO_ROOT / "recipes"
STAGES = ("1", "2", "3")


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


@dataclass
class AdapterArguments:
    """LoRA on the language model; the projector trains beside it, whole."""

    lora_r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scaling factor."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the LoRA branch."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers of the language model that get an adapter."},
    )

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; it must be at least 1")


@dataclass
class DataArguments(MixtureConfig):
    """What is trained on: the mixture, and how the drawn data set reasons in stage 3."""

    direct_share: float = field(default=0.0, metadata={"help": "Stage 3: share of rows answered without reasoning."})
    rationale_style: str = field(default="structured", metadata={"help": "Stage 3: style of the scripted oracle."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.direct_share <= 1:
            raise ValueError(f"direct_share is {self.direct_share}; it must lie between 0 and 1")


@dataclass
class Recipe:
    """One stage of one recipe, ready to run."""

    stage: str
    name: str
    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    training: SFTConfig


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
    """Parse `--stage`, `--recipe` and any number of overrides.

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
    chosen, rest = chooser.parse_known_args(sys.argv[1:] if argv is None else argv)
    parser = TrlParser((ModelArguments, AdapterArguments, DataArguments, SFTConfig), description=description)
    if {"-h", "--help"} & set(rest):
        parser.parse_args_and_config(args=["--help"])
    if chosen.stage not in stages:
        raise ValueError(f"stage is {chosen.stage!r}; pass --stage {' or --stage '.join(stages)}")
    if chosen.recipe not in recipe_names():
        raise ValueError(
            f"recipe is {chosen.recipe!r}; it must be one of {', '.join(recipe_names())} (folders of recipes/)"
        )
    path = RECIPES / chosen.recipe / f"stage{chosen.stage}.yaml"
    if not path.exists():
        raise ValueError(
            f"recipe {chosen.recipe!r} has no stage {chosen.stage}: {path.name} is missing in recipes/{chosen.recipe}"
        )
    if not any(argument.split("=")[0] == "--output_dir" for argument in rest):
        rest = [*rest, "--output_dir", str(stage_folder(chosen.recipe, chosen.stage))]
    if not torch.accelerator.is_available():
        rest = [*rest, "--use_cpu", "true"]  # bf16 on a machine with no accelerator has to be asked for
    model, adapter, data, training = parser.parse_args_and_config(args=["--config", str(path), *rest])
    return Recipe(chosen.stage, chosen.recipe, model, adapter, data, training)


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
