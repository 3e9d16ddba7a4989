"""Recipes: one YAML a stage, parsed by `TrlParser`; every field can be overridden on the command line.

What is stated later wins: the recipe's file of the stage, the file of `--config`, the command line. A file may name
another one as its `base`, relative to itself, and then states only what differs.

Relative paths in a recipe are looked for in the working folder, then beside the recipe's files, then in this repository.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser

from siq_vl.data.mixture_config import FeatureArguments
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.training.arguments import DataArguments, HubArguments, ModelArguments, RunArguments
from siq_vl.training.settings import (
    arrange_batches,
    check_checkpoints,
    check_evaluation,
    check_model,
    check_traces,
    chosen_sources,
    keep_effective_batch,
    refuse_fields,
    take_hub_arguments,
)

# `--help` and everything that only reads recipes do without torch and transformers, which take seconds to import.
if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger(__name__)

REPO_ROOT = Path(__file__).resolve().parents[2]
RECIPES = REPO_ROOT / "recipes"
TASKS = {"1": "caption", "2": "answer", "3": "reason"}  # what drawn figures are asked in a stage

_USAGE = "%(prog)s [--stage STAGE] [--recipe RECIPE] [--config FILE] [--FIELD VALUE ...]"
_MORE_HELP = """\
Beside these, every field of TRL's SFTConfig is taken, and with it every one of transformers' TrainingArguments:
--learning_rate, --max_steps, --max_length, --bf16, --save_steps, --report_to ... `--help_all` lists them all; they are
described at https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig."""


@dataclass
class Recipe:
    """One stage of one recipe, ready to run.

    Args:
        stage: "1", "2" or "3".
        name: of the recipe, and of its folder in `outputs`.
        model: the model and its LoRA.
        data: what is trained on.
        training: the trainer's settings.
        run: how the run goes about it.
        hub: where the checkpoint is pushed.
        features: whether vision features are stored.
        traces: what stage 3 learns from.
        variant: which of several files of the stage it is; empty for its default.
        folder: of the recipe's files; None for a run that a file of `--config` states alone.
        places: folders for relative paths, beside the working folder.
    """

    stage: str
    name: str
    model: ModelArguments
    data: DataArguments
    training: "SFTConfig"
    run: RunArguments = field(default_factory=RunArguments)
    hub: HubArguments = field(default_factory=HubArguments)
    features: FeatureArguments = field(default_factory=FeatureArguments)
    traces: TraceArguments | None = None
    variant: str = ""
    folder: Path | None = None
    places: Sequence[Path] = (REPO_ROOT,)

    @property
    def title(self) -> str:
        """The recipe's name and, where it is not the stage's default, the variant's."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def task(self) -> str:
        """What drawn figures are asked in this stage."""
        return TASKS[self.stage]

    def find(self, path: str) -> str:
        """Return the folder that a path of the recipe means, or the path unchanged, as a Hub id, where there is none."""
        return local_or_hub(path, self.places)

    def has(self, path: str) -> bool:
        """Whether a file or folder that the recipe names is on this machine."""
        return any((place / path).exists() for place in (Path(), *self.places))


def recipe_names() -> list[str]:
    """Return the recipes that the repo carries."""
    return sorted(path.name for path in RECIPES.iterdir() if path.is_dir())


def local_or_hub(path: str, places: Sequence[Path] = (REPO_ROOT,)) -> str:
    """Return a folder below the working folder or one of the places where there is one, else the Hub id unchanged."""
    for place in (Path(), *places):
        if (place / path).is_dir():
            return str(place / path)
    return path


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a script's description, and says every default."""


def parse_recipe(stages: tuple[str, ...], argv: list[str] | None = None, description: str | None = None) -> Recipe:
    """Parse `--stage`, `--recipe`, `--variant`, `--config` and any number of overrides.

    `--variant NAME` picks one of several files of a stage, `stage<n>-<name>.yaml`; it has an output folder of its own.
    `--config FILE` is TRL's: a YAML anywhere. Its values win over those of the recipe, if one is named beside it.

    Args:
        stages: the stages that the calling script runs; with a single one, `--stage` may be left out.
        argv: the command line, `sys.argv[1:]` by default.
        description: shown by `--help`, before the fields.

    Raises:
        ValueError: unknown stage or recipe, or a field that its own check refuses.
    """
    chooser = _chooser(stages)
    chosen, overrides = chooser.parse_known_args(sys.argv[1:] if argv is None else argv)
    groups = [ModelArguments, DataArguments, ScriptArguments, DatasetMixtureConfig, RunArguments, FeatureArguments]
    if chosen.stage == "3":
        groups.append(TraceArguments)
    looks = {"usage": _USAGE, "description": description, "formatter_class": _HelpFormatter}
    if {"-h", "--help"} & set(overrides):
        TrlParser(groups, parents=[chooser], epilog=_MORE_HELP, **looks).parse_args(["--help"])
    from trl import SFTConfig

    if "--help_all" in overrides:
        TrlParser([*groups, SFTConfig], parents=[chooser], **looks).parse_args(["--help"])
    parser = TrlParser([*groups, SFTConfig])
    if chosen.stage not in stages:
        raise ValueError(f"stage is {chosen.stage!r}; pass --stage {' or --stage '.join(stages)}")

    # From the files to the parser's defaults, each file over the one before.
    files, recipe = _files_of(chosen)
    parser.set_defaults_with_config(output_dir=str(stage_folder(recipe["name"], chosen.stage, recipe["variant"])))
    stated = []
    for path in files:
        for settings in read_layers(path):
            stated.append(set(settings))
            unknown = parser.set_defaults_with_config(**settings)
            if unknown:
                raise ValueError(
                    f"{path.name} has {', '.join(unknown[::2])}, which stage {chosen.stage} does not know: remove it, or "
                    "see --help_all for what there is"
                )
    named = [argument.split("=")[0] for argument in overrides if argument.startswith("--")]
    stated.append({name.removeprefix("--").replace("-", "_") for name in named})

    try:
        parsed = parser.parse_args_and_config(args=[*overrides, *_of_this_machine()])
    except ValueError as error:  # what the libraries find wrong with a field is about the command line too
        where = " or ".join(path.name for path in files)
        raise ValueError(f"{error}: correct the field in {where} or on the command line") from error
    model, data, script, mixture, run, features, *traces, training = parsed
    refuse_fields(training, script, mixture)
    data.sources = chosen_sources(data, script, mixture, stated)
    check_model(model, training, chosen.stage)
    keep_effective_batch(training, run.effective_batch_size)
    arrange_batches(training, run)
    # What it asks for is always so here, and TRL would change the chat template for it.
    training.assistant_only_loss = False
    check_checkpoints(training)
    if traces:
        check_traces(traces[0], training, data, run)
    else:
        check_evaluation(training)
    if traces:
        _find_traces(traces[0], recipe["places"])
    return Recipe(
        stage=chosen.stage,
        model=model,
        data=data,
        training=training,
        run=run,
        hub=take_hub_arguments(training),
        features=features,
        traces=traces[0] if traces else None,
        **recipe,
    )


def _chooser(stages: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the parser of what decides which files are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_stage = stages[0] if len(stages) == 1 else None
    parser.add_argument("--stage", default=only_stage, help=f"One of {', '.join(stages)}.")
    parser.add_argument(
        "--recipe",
        help=f"One of {', '.join(recipe_names())}, or any folder that holds stage1.yaml and so on. Without it, the file "
        "of --config; without that, tiny.",
    )
    parser.add_argument(
        "--variant",
        default="",
        help="One of several files of the stage in the recipe's folder, stage<n>-<variant>.yaml.",
    )
    parser.add_argument("--config", help="TRL's: a YAML file of fields. They win over those of --recipe.")
    return parser


def _files_of(chosen: argparse.Namespace) -> tuple[list[Path], dict[str, Any]]:
    """Return the files that the command line names, those that win last, and the recipe's fields that hang on them."""
    if chosen.config is not None and not Path(chosen.config).is_file():
        raise ValueError(
            f"config is {chosen.config!r}, and there is no such file: pass a YAML of fields, as to any script of TRL; a "
            f"variant of stage {chosen.stage} is chosen by --variant {chosen.config}"
        )
    given = chosen.recipe
    if chosen.config is None:
        config_files = []
        given = given or "tiny"
    else:
        config_files = [Path(chosen.config)]
    places = [path.parent for path in config_files]
    if given is None:
        if chosen.variant:
            raise ValueError(f"variant is {chosen.variant!r}, which is of a recipe: pass --recipe too, or drop it")
        name = config_files[0].stem
        return config_files, {"name": name, "variant": "", "folder": None, "places": [*places, REPO_ROOT]}
    folder = _recipe_folder(given)
    path = _stage_file(folder, chosen.stage, chosen.variant)
    if folder.parent != RECIPES:
        places.append(folder)
    variant = path.stem.partition("-")[2]
    recipe = {"name": folder.resolve().name, "variant": variant, "folder": folder, "places": [*places, REPO_ROOT]}
    return [path, *config_files], recipe


def _recipe_folder(given: str) -> Path:
    """Return the folder of a recipe: one of the repo by its name, or any by its path."""
    if given in recipe_names():
        return RECIPES / given
    folder = Path(given)
    if not folder.is_dir():
        raise ValueError(
            f"recipe is {given!r}; it must be one of {', '.join(recipe_names())} (folders of recipes/), or the path of a "
            "folder that holds stage1.yaml and so on"
        )
    name = folder.resolve().name
    if name in recipe_names():
        if folder.resolve() == (RECIPES / name).resolve():
            return RECIPES / name
        raise ValueError(
            f"recipe is {given!r}, and what it leaves would go to outputs/{name}, where this repository's recipe {name} "
            "leaves its own: give the folder another name"
        )
    return folder


def _stage_file(folder: Path, stage: str, variant: str) -> Path:
    """Return the YAML of a stage; `variant` is one of its variants by name, `_` being as good as `-`."""
    path = folder / f"stage{stage}{'-' if variant else ''}{variant.replace('_', '-')}.yaml"
    if path.exists():
        return path
    if variant:
        known = sorted(path.stem.partition("-")[2] for path in folder.glob(f"stage{stage}-*.yaml"))
        raise ValueError(
            f"variant is {variant!r}; stage {stage} of recipe {folder.name!r} has {', '.join(known) or 'its default alone'}"
            ": pass one of these, or leave --variant out"
        )
    raise ValueError(f"recipe {folder.name!r} has no stage {stage}: {path.name} is missing in {folder}")


def read_layers(path: Path) -> list[dict[str, Any]]:
    """Return what a YAML file states, behind what the files state that it stands on: the last wins.

    Environment variables of `env` are set, as TRL does.

    Raises:
        ValueError: no YAML of fields, or a file that stands on itself.
    """
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ValueError(f"{path} stands on itself: {following} is among the files that its base leads to")
        seen.append(following.resolve())
        try:
            settings = yaml.safe_load(following.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{following} cannot be read as YAML: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{following} must hold fields with their values, as `max_steps: 500`")
        base = settings.pop("base", None)
        os.environ.update({name: str(value) for name, value in (settings.pop("env", None) or {}).items()})
        layers.insert(0, settings)
        following = None if base is None else following.parent / base
    return layers


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a YAML file and those that it stands on state together, unparsed."""
    together: dict[str, Any] = {}
    for settings in read_layers(path):
        together.update(settings)
    return together


def _find_traces(traces: TraceArguments, places: Sequence[Path]) -> None:
    """Let a store that lies beside the recipe be found; this repository holds none."""
    for name in ("traces", "image_root"):
        path = getattr(traces, name)
        if path is None or Path(path).exists():
            continue
        for place in places:
            if place != REPO_ROOT and (place / path).is_dir():
                setattr(traces, name, str(place / path))


def _of_this_machine() -> list[str]:
    """Return the overrides that a machine without an accelerator needs."""
    import torch

    if torch.accelerator.is_available():
        return []
    overrides = ["--use_cpu", "true"]  # bf16 on a machine with no accelerator has to be asked for
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        overrides += ["--ddp_backend", "gloo"]
    return overrides


def backbones_of(recipe: Recipe) -> tuple[str | None, str | None]:
    """Return the vision tower and the language model of a recipe; stages 2 and 3 take those of its `stage1.yaml`."""
    model = recipe.model
    first: dict[str, Any] = {}
    if recipe.stage != "1" and recipe.folder is not None and (recipe.folder / "stage1.yaml").exists():
        first = read_settings(recipe.folder / "stage1.yaml")
    return (
        model.vision_tower or first.get("vision_tower"),
        model.language_model or first.get("language_model"),
    )


def stage_folder(recipe: str, stage: str, variant: str = "") -> Path:
    """Return where a stage of a recipe leaves its checkpoint by default."""
    return Path("outputs") / recipe / f"stage{stage}{'-' if variant else ''}{variant}"


def starting_checkpoint(recipe: Recipe) -> str:
    """Return the checkpoint that stage 2 or 3 starts from.

    Raises:
        ValueError: the previous stage has left none.
    """
    if recipe.model.model_name_or_path is not None:
        return recipe.find(recipe.model.model_name_or_path)
    previous = str(int(recipe.stage) - 1)
    folder = stage_folder(recipe.name, previous)
    if not (folder / "config.json").exists():
        chosen = recipe.name
        if recipe.folder is not None and recipe.folder.parent != RECIPES:
            chosen = str(recipe.folder)
        raise ValueError(
            f"stage {recipe.stage} starts from stage {previous}, and {folder} holds no checkpoint: run "
            f"`python train_sft.py --stage {previous} --recipe {chosen}` first, or pass --model_name_or_path"
        )
    return str(folder)
