"""Writing a stage's checkpoint: complete, loadable anywhere, and never half there."""

import json
import logging
import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTTrainer

from siq_vl.data.mixtures import MixtureReport
from siq_vl.distill.traces import origins
from siq_vl.distill.training_rows import store_state
from siq_vl.hub import BEFORE_AFTER_FILE, CURVE_FILE, EMERGENCE_FIGURE, SCORES_FILE, model_card
from siq_vl.plots import learning_curve_plot
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.terms import inherited, is_hub_id, made_from, source_name
from siq_vl.training.arguments import ADAPTER_FIELDS, ModelArguments
from siq_vl.training.quantization import merge_adapter
from siq_vl.training.recipes import Recipe, backbones_of, starting_checkpoint
from siq_vl.training.sharding import whole_model

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
LOG_FILE = "training_log.jsonl"

# Fields of the trainer's settings that say nothing about the run: a log folder that transformers 4 names after the
# machine, and what belongs to the Hub account.
_PRIVATE_SETTINGS = ("logging_dir", "hub_token", "push_to_hub_token")
# The trainer's settings that decide what is learnt: the others may change between the parts of a run.
_LEARNING_SETTINGS = (
    ("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
    + ("warmup_ratio", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    + ("max_grad_norm", "seed", "data_seed", "bf16", "fp16", "max_length", "loss_type", "label_smoothing_factor")
    + ("neftune_noise_alpha",)
)


def run_settings(recipe: Recipe) -> dict:
    """Return what must be the same for a run to go on from one of its checkpoints."""
    settings = {"stage": recipe.stage, "samples a step": samples_a_step(recipe)}
    model, adapter = model_and_adapter(recipe.model)
    groups = {"model": model, "adapter": adapter, "data": asdict(recipe.data)}
    if recipe.traces is not None:
        groups["traces"] = asdict(recipe.traces)
        settings["the store's shards"] = store_state(recipe.traces)
    training = recipe.training.to_dict()
    groups["training"] = {name: training.get(name) for name in _LEARNING_SETTINGS}
    for group, values in groups.items():
        for name, value in values.items():
            settings[f"{group}.{name}"] = value
    return settings


def settings_unnamed_before() -> dict:
    """Return the defaults of model and adapter: what they were in checkpoints of versions that did not name them."""
    model, adapter = model_and_adapter(ModelArguments())
    defaults = {f"model.{name}": value for name, value in model.items()}
    defaults.update({f"adapter.{name}": value for name, value in adapter.items()})
    return defaults


def model_and_adapter(arguments: ModelArguments) -> tuple[dict, dict]:
    """Return the fields of the model and those of its adapter, as settings keep them apart."""
    model = asdict(arguments)
    adapter = {name: model.pop(name) for name in ADAPTER_FIELDS}
    return model, adapter


def samples_a_step(recipe: Recipe) -> int:
    """Return how many samples an optimizer step takes, over all processes."""
    training = recipe.training
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def save_stage(
    trainer: SFTTrainer,
    processor: SiQVLProcessor,
    recipe: Recipe,
    seconds: float,
    report: MixtureReport | None = None,
    *,
    steps: int | None = None,
) -> Path:
    """Write the stage's checkpoint: merged weights, processor, code files, model card, settings, log and curve.

    The adapter is kept beside them in `adapter/`. Everything is written to a scratch folder first and moved in place
    with `config.json` last, so that a folder with a `config.json` always is a complete checkpoint. With several
    processes all of them call this, and the first one writes.

    Args:
        trainer: the trainer, after training.
        processor: the processor to save with the model.
        recipe: what was run.
        seconds: how long training took.
        report: counts of the rows that were used and left out.
        steps: how many steps it took in that time; all of them by default.

    Returns:
        The checkpoint's folder, `recipe.training.output_dir`.
    """
    folder = Path(recipe.training.output_dir)
    model = whole_model(trainer, recipe)
    if trainer.accelerator.is_main_process:
        scratch = folder / ".incomplete"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        merged_into = None
        if isinstance(model, PeftModel):
            _save_adapter(model, scratch / ADAPTER_FOLDER)
            model, merged_into = merge_adapter(model, scratch / ADAPTER_FOLDER, recipe.model)
        _save_model(model, processor, scratch)
        settings = _settings(trainer, recipe, seconds, steps, report, merged_into)
        _write_records(scratch, settings, trainer.state.log_history)
        _move_in_place(scratch, folder)
        logger.info("stage %s left its checkpoint in %s after %.0f s of training", recipe.stage, folder, seconds)
    trainer.accelerator.wait_for_everyone()
    return folder


def _settings(
    trainer: SFTTrainer,
    recipe: Recipe,
    seconds: float,
    steps: int | None,
    report: MixtureReport | None,
    merged_into: str | None,
) -> dict:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    steps = trainer.state.global_step if steps is None else steps
    in_parts = steps != trainer.state.global_step
    speed = {"samples_per_second": round(steps * samples_a_step(recipe) / seconds, 3) if seconds else None}
    if tokens and seconds and not in_parts:
        speed["tokens_per_second"] = round(tokens[-1] / seconds, 1)
    model, adapter = model_and_adapter(recipe.model)
    settings = {
        "stage": recipe.stage,
        "recipe": recipe.name,
        "config": recipe.variant or None,
        "decoder": trainer.model.config.text_config.model_type,
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "effective_batch_size": samples_a_step(recipe),
        "processes": recipe.training.world_size,
        "final_loss": losses[-1] if losses else None,
        "best": _best(trainer),
        "speed": {**speed, "peak_memory_gib": peak_memory_gib()},
        "backbones": dict(zip(("vision_tower", "language_model"), backbones_of(recipe), strict=True)),
        "model": model,
        "adapter": None if recipe.stage == "1" else adapter,
        "merged_into": merged_into,
        "data": asdict(recipe.data),
        "traces": recipe.traces and asdict(recipe.traces),
        "data_counts": report and report.to_dict(),
        "data_table": report and report.table(),
        "run": asdict(recipe.run),
        "training": {name: value for name, value in recipe.training.to_dict().items() if name not in _PRIVATE_SETTINGS},
    }
    settings["made_from"] = sorted({*made_from(settings), *asked_from(recipe), *_inherited(recipe)})
    return _portable(settings)


def asked_from(recipe: Recipe) -> list[str]:
    """Return the ids that the questions of a recipe's traces are from, as far as the store notes it."""
    if recipe.traces is None or recipe.traces.traces is None:
        return []
    names = [source_name({"path": each["source"], **each}) for each in origins(Path(recipe.traces.traces))]
    return [name for name in names if is_hub_id(name)]


def _inherited(recipe: Recipe) -> list[str]:
    """Return what the checkpoint that a stage starts from was made from."""
    if recipe.stage == "1" or recipe.model.random_weights:
        return []
    start = starting_checkpoint(recipe)
    return inherited(Path(start)) or [start]


def _best(trainer: SFTTrainer) -> dict | None:
    """Return which step's weights are kept and their validation loss, where they are not the last step's."""
    if not trainer.args.load_best_model_at_end or trainer.state.best_model_checkpoint is None:
        return None
    step = int(Path(trainer.state.best_model_checkpoint).name.rpartition("-")[2])
    metric = trainer.args.metric_for_best_model.removeprefix("eval_")
    return {"step": step, f"validation {metric}": trainer.state.best_metric}


def _portable(value):
    """Return settings with absolute paths cut to their last part: they mean nothing on another machine."""
    if isinstance(value, Mapping):
        return {name: _portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def peak_memory_gib() -> dict[str, float]:
    """Return the most memory this process has held, in GiB: of the machine, and of the accelerator if there is one."""
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    if torch.cuda.is_available():
        peak["accelerator"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


def _write_records(folder: Path, settings: dict, history: list[dict]) -> None:
    (folder / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (folder / "training_settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    curves = loss_curves(history)
    if curves:
        title = f"Training loss of stage {settings['stage']}, recipe {settings['recipe']}"
        (folder / CURVE_FILE).write_text(learning_curve_plot(curves, title), encoding="utf-8")
    emerged = (folder.parent / EMERGENCE_FIGURE).exists()
    card = model_card(settings, has_curve=bool(curves), has_emergence=emerged)
    (folder / "README.md").write_text(card, encoding="utf-8")


def loss_curves(history: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    """Return the loss, and the loss of each source, as (step, loss) points from a trainer's log history."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "loss" or name.startswith("loss/"):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def _save_adapter(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)  # they do not train; PEFT would ask the Hub about them
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(_portable(json.loads(path.read_text())), indent=2) + "\n")


def _save_model(model: PreTrainedModel, processor: SiQVLProcessor, folder: Path) -> None:
    model.config.use_cache = True
    for config in (model.config.vision_config, model.config.text_config):
        config._name_or_path = ""  # transformers 4 writes the folder that a backbone was loaded from
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _move_in_place(scratch: Path, folder: Path) -> None:
    for stale in ("config.json", BEFORE_AFTER_FILE, SCORES_FILE):  # measured of the weights that go
        (folder / stale).unlink(missing_ok=True)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    scratch.rmdir()
