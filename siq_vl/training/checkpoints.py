"""Writing a stage's checkpoint: complete, loadable anywhere, and never half there."""

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTTrainer

from siq_vl.data.mixtures import MixtureReport
from siq_vl.hub import model_card
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.recipes import Recipe

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
LOG_FILE = "training_log.jsonl"


def save_stage(
    trainer: SFTTrainer,
    processor: SiQVLProcessor,
    recipe: Recipe,
    seconds: float,
    report: MixtureReport | None = None,
) -> Path:
    """Write the stage's checkpoint: merged weights, processor, code files, model card, settings and log.

    The adapter is kept beside them in `adapter/`. Everything is written to a scratch folder first and moved in place
    with `config.json` last, so that a folder with a `config.json` always is a complete checkpoint.

    Args:
        trainer: the trainer, after training.
        processor: the processor to save with the model.
        recipe: what was run.
        seconds: how long training took.
        report: counts of the rows that were used and left out.

    Returns:
        The checkpoint's folder, `recipe.training.output_dir`.
    """
    folder = Path(recipe.training.output_dir)
    scratch = folder / ".incomplete"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        model.save_pretrained(scratch / ADAPTER_FOLDER)
        model = model.merge_and_unload()
    _save_model(model, processor, scratch)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    (scratch / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))
    settings = {
        "stage": recipe.stage,
        "recipe": recipe.name,
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "final_loss": history[-1]["loss"] if history else None,
        "model": asdict(recipe.model),
        "adapter": None if recipe.stage == "1" else asdict(recipe.adapter),
        "data": asdict(recipe.data),
        "data_counts": report and report.to_dict(),
        # transformers 4 fills in a log folder that is named after the machine.
        "training": {name: value for name, value in recipe.training.to_dict().items() if name != "logging_dir"},
    }
    (scratch / "training_settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    (scratch / "README.md").write_text(model_card(settings, report and report.table()))
    _move_in_place(scratch, folder)
    logger.info("stage %s left its checkpoint in %s after %.0f s of training", recipe.stage, folder, seconds)
    return folder


def _save_model(model: PreTrainedModel, processor: SiQVLProcessor, folder: Path) -> None:
    model.config.use_cache = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _move_in_place(scratch: Path, folder: Path) -> None:
    (folder / "config.json").unlink(missing_ok=True)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    scratch.rmdir()
