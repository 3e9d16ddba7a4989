"""Settings together: which cannot be meant, and what those of TRL come to here."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

from siq_vl.data.mixture_config import FIGURES, SourceConfig
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.training.arguments import DataArguments, HubArguments, ModelArguments, RunArguments

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger(__name__)

# Fields of TRL that have no meaning here, or one that a field of ours has: why, and what to use instead.
_OWN_ROWS = "rows are prepared as they are read: "
_OWN_TEXT = "texts are made by the checkpoint's own processor: change the template or the tokenizer of the checkpoint"
_REFUSED_BY_NAME = {
    "use_liger_kernel": "Liger has no kernels for this model type and would change nothing: drop it; the output layer is "
    "fused without it",
    "model_init_kwargs": "the model is loaded before the trainer is there: use attn_implementation, dtype, model_revision",
    "chat_template_path": _OWN_TEXT,
    "eos_token": _OWN_TEXT,
    "pad_token": _OWN_TEXT,
    "dataset_text_field": _OWN_ROWS + "use sources, where `format` names the columns",
    "dataset_kwargs": _OWN_ROWS + "drop it",
    "dataset_num_proc": _OWN_ROWS + "use dataloader_num_workers",
    "shuffle_dataset": "rows are drawn at random in any case: drop it, and set data_seed for another order",
    "truncation_mode": "a row longer than max_length is left out, never cut: drop it",
    "packing_strategy": "TRL packs text alone: use batching: packed, and pack_tokens",
    "eval_packing": "evaluation pads: drop it",
    "pad_to_multiple_of": "a batch is padded to its longest row: use batching: packed, and pack_tokens, for equal shapes",
    "completion_only_loss": "the loss is always on every assistant turn and on nothing else: drop it",
    "auto_find_batch_size": "it would change how many samples a step takes: lower per_device_train_batch_size, the "
    "effective batch size stays",
    "dataset_test_split": "stages 1 and 2 validate nothing while they train: use sample_steps, or evaluate_vqa.py after it",
    "test_split_size": "stages 1 and 2 validate nothing while they train: use sample_steps; validation_share in stage 3",
    "ignore_bias_buffers": "this model has no such buffers: drop it",
}


def refuse_fields(*groups: Any) -> None:
    """Refuse fields of TRL that would be silently without effect."""
    for group in groups:
        for each in fields(group):
            reason = _REFUSED_BY_NAME.get(each.name)
            value = getattr(group, each.name)
            # Some defaults become None once it is known what they come to on this machine.
            if reason is None or value in (each.default, None):
                continue
            raise ValueError(f"{each.name} is {_as_yaml(value)}, but {reason}")


def _as_yaml(value: Any) -> str:
    """Return a value as a recipe would state it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def chosen_sources(
    data: DataArguments, script: ScriptArguments, mixture: DatasetMixtureConfig, stated: Sequence[set[str]]
) -> list[SourceConfig]:
    """Return the sources of a run: ours, or those that TRL's fields name, whichever were stated last.

    Args:
        data: has `sources`.
        script: has `dataset_name`.
        mixture: has `datasets`, which wins over `dataset_name`.
        stated: names of the fields that each file states, and last the command line.

    Raises:
        ValueError: both in one place, or a field of a data set of TRL that has another meaning here.
    """
    by_trl = False
    for names in stated:
        of_trl = names & {"dataset_name", "datasets"}
        if of_trl and "sources" in names:
            raise ValueError(f"sources and {of_trl.pop()} are both set: they say what is trained on, so drop one")
        if of_trl:
            by_trl = True
        elif "sources" in names:
            by_trl = False
    if not by_trl:
        everything = set().union(*stated)
        for name in ("dataset_config", "dataset_train_split", "dataset_streaming", "streaming"):
            if name in everything and not everything & {"dataset_name", "datasets"}:
                raise ValueError(
                    f"{name} is set, but what is trained on are the sources: set dataset_name or datasets as well, or "
                    "drop it and use the fields of a source"
                )
        return data.sources
    if mixture.datasets and script.dataset_name:
        logger.warning(
            "dataset_name is %s, and datasets are set too, which are what is trained on", script.dataset_name
        )
    if not mixture.datasets:
        return [
            SourceConfig(
                script.dataset_name,
                subset=script.dataset_config,
                split=script.dataset_train_split,
                streaming=script.dataset_streaming,
            )
        ]
    sources = []
    for dataset in mixture.datasets:
        for name, instead in (
            ("data_dir", "data_files, or the path of the folder"),
            ("columns", "sources, where `format` names the columns"),
            ("fraction", "sources with a weight, which draws rows, more than once where a source is small"),
        ):
            if getattr(dataset, name) is not None:
                raise ValueError(
                    f"{name} of {dataset.path} is {getattr(dataset, name)!r}, which is not read here: use {instead}"
                )
        if not isinstance(dataset.data_files, str | None):
            raise ValueError(f"data_files of {dataset.path} is {dataset.data_files!r}; name one file an entry")
        sources.append(
            SourceConfig(
                dataset.path,
                subset=dataset.name,
                data_files=dataset.data_files,
                split=dataset.split,
                streaming=mixture.streaming,
            )
        )
    return sources


def check_model(model: ModelArguments, training: "SFTConfig", stage: str) -> None:
    """Refuse what a model cannot be in a stage."""
    if model.dtype == "bfloat16" and not training.bf16:
        raise ValueError("dtype is bfloat16 and bf16 is false: what trains is float32, so set bf16, or dtype float32")
    if stage == "1" and model.use_peft:
        raise ValueError(
            "use_peft is set, but stage 1 trains the projector alone, whole: drop it; stages 2 and 3 use LoRA"
        )
    if stage == "1" and model.model_revision != "main":
        raise ValueError(
            f"model_revision is {model.model_revision!r}, but stage 1 joins two backbones, each with revisions of its own: "
            "download the one you want, and name its folder as vision_tower or language_model"
        )


def keep_effective_batch(training: "SFTConfig", wanted: int) -> None:
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


def arrange_batches(training: "SFTConfig", run: RunArguments) -> None:
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


def check_checkpoints(training: "SFTConfig") -> None:
    """Refuse to keep a single checkpoint, and warn where a resumed run would log another loss."""
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


def check_traces(traces: TraceArguments, training: "SFTConfig", data: DataArguments, run: RunArguments) -> None:
    """Refuse what does not go together in stage 3; with early stopping, let its count go on with a resumed run."""
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


def check_evaluation(training: "SFTConfig") -> None:
    """Refuse a validation in stages 1 and 2, which keep no rows for it."""
    if training.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy is {training.eval_strategy.value!r}, but stages 1 and 2 validate nothing while they train: use "
            "sample_steps, or evaluate_vqa.py after it"
        )


def take_hub_arguments(training: "SFTConfig") -> HubArguments:
    """Return where the checkpoint is pushed, and take it out of the trainer's settings."""
    taken = HubArguments(
        push_to_hub=training.push_to_hub,
        repo_id=training.hub_model_id,
        revision=training.hub_revision,
        private=training.hub_private_repo,
        token=training.hub_token,
    )
    training.push_to_hub, training.hub_token = False, None
    return taken
