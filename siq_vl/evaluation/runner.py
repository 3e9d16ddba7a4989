"""
Asking a checkpoint many questions: sorted batches, several processes, faults survived, interruptions too.

Every batch is appended to the predictions' file as soon as it is answered. The file belongs to one run, described in
`<name>.run.json` beside it (the weights' checksum among other things): the same run goes on where it was interrupted,
another one begins anew.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin

from siq_vl.data.conversations import Dropped
from siq_vl.evaluation.generation import batches_by_length, complete, rendered
from siq_vl.evaluation.items import Item
from siq_vl.evaluation.predictions import (
    IMAGE,
    MODEL,
    NOT_SCORED,
    ROW,
    Prediction,
    append_predictions,
    cut_half_line,
    judge,
    read_predictions,
    read_unfinished,
    write_predictions,
)
from siq_vl.loading import load_checkpoint
from siq_vl.locks import Lock

logger = logging.getLogger(__name__)

# What models and processors raise on inputs that they cannot take; running out of memory is a RuntimeError.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError)


@dataclass(frozen=True)
class RunSettings:
    """How questions are asked.

    Args:
        batch_size: questions answered together; it changes no answer.
        max_new_tokens: bound on an answer, rationale included.
        max_thinking_tokens: bound on the rationale, after which an answer is asked for; none by default.
        blind: withhold every picture.
        template_options: given to the chat template, over those of the question.
    """

    batch_size: int = 64
    max_new_tokens: int = 128
    max_thinking_tokens: int | None = None
    blind: bool = False
    template_options: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def record(self) -> dict[str, object]:
        """Return what of the settings changes answers, as `<name>.run.json` holds it."""
        record: dict[str, object] = {
            "blind": self.blind,
            "max_new_tokens": self.max_new_tokens,
            "template_options": dict(self.template_options or {}),
        }
        if self.max_thinking_tokens is not None:
            record["max_thinking_tokens"] = self.max_thinking_tokens
        return record


def load_any(path: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return model and processor of any image-text-to-text checkpoint, ours or another's, in evaluation mode.

    Args:
        path: a checkpoint's folder, or its id on the Hub.
        trust_remote_code: run the code that the checkpoint carries, where transformers does not know its type. Our own
            checkpoints are always read by this repository's classes.

    Raises:
        ValueError: the folder holds no checkpoint, or transformers cannot read it.
    """
    folder = Path(path)
    on_the_hub = not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/"))
    if not on_the_hub and not (folder / "config.json").exists():
        return load_checkpoint(path)  # which says what is wrong
    device = process_state().device
    try:
        config, _ = PretrainedConfig.get_config_dict(path)
        if config.get("model_type") == "siq_vl":
            model, processor = load_checkpoint(path)
        else:
            model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=trust_remote_code, dtype="auto")
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    return model.to(device).eval(), processor


def fingerprint(checkpoint: str) -> str:
    """Return a checksum of a folder's weights, processor and configuration; of a Hub id, the id itself."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    # What answers depend on; logs, cards and optimizer states may change beside it.
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".jinja") or file.name.endswith(("config.json", "tokenizer.json")):
            digest.update(file.name.encode())
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def process_state() -> PartialState:
    """Return what accelerate knows of this process and its siblings, who wait for the slowest for up to a day."""
    if PartialState._shared_state:
        return PartialState()
    # Unless it is told so, it takes every process on a CPU for the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=1))


def run(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    path: Path,
    settings: RunSettings,
    *,
    identity: Mapping[str, object] | None = None,
    progress: str | None = None,
) -> list[Prediction]:
    """Ask a model every question and return its judged answers, in the questions' order.

    What `path` already holds of the same run is judged again and not asked again; what failed in the model then is. A
    question whose picture or row cannot be read, whose gold answer is missing, or at which the model raises, is a
    prediction with a fault: see `fault_report`. With several processes each asks its share, and all return the same.

    Args:
        model: any image-text-to-text model, in evaluation mode.
        processor: its processor.
        items: the questions, their ids distinct.
        path: JSON lines, one a question.
        settings: how they are asked.
        identity: what else tells this run from others, such as the weights' checksum.
        progress: what the progress bar says; no bar by default.

    Raises:
        ValueError: two questions have one id, another run writes `path`, or the model failed at every question.
    """
    counts = Counter(item.id for item in items)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} ids are given to several questions, {repeated[0]!r} for one: make them distinct"
        )
    state = process_state()
    with Lock(path, held=state.is_main_process, is_file=True):
        return _run(model, processor, items, path, settings, state, {**(identity or {}), **settings.record()}, progress)


def _run(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    path: Path,
    settings: RunSettings,
    state: PartialState,
    record: Mapping[str, object],
    progress: str | None,
) -> list[Prediction]:
    """Ask what is not answered yet; see `run`. `record` tells this run from others."""
    if state.is_main_process:
        _begin(path, record)
    state.wait_for_everyone()
    answered = _read_answered(path, items)
    state.wait_for_everyone()  # nobody appends before everybody has read
    missing = [item for item in items if item.id not in answered]
    if answered and missing and state.is_main_process:
        logger.info("%s: %d of %d questions are answered already", path.stem, len(answered), len(items))

    # The first process appends to the file itself, every other one to a file of its own beside it.
    own_file = path
    if not state.is_main_process:
        own_file = path.with_suffix(f".rank{state.process_index}.jsonl")
    share = missing[state.process_index :: state.num_processes]
    _Questioner(model, processor, settings, own_file).ask(share, progress if state.is_main_process else None)

    state.wait_for_everyone()
    if state.is_main_process:
        finished = _read_answered(path, items, failed_too=True)
        write_predictions([finished[item.id] for item in items], path)
        for file in _files_of_ranks(path):
            file.unlink()
    state.wait_for_everyone()
    predictions = read_predictions(path)
    note = cut_off_note(path.stem, predictions, settings.max_new_tokens)
    if note and state.is_main_process:
        logger.warning(note)
    if predictions and all(prediction.fault == MODEL for prediction in predictions):
        raise ValueError(f"the model failed at every question; the first time: {predictions[0].detail}")
    return predictions


def _begin(path: Path, record: Mapping[str, object]) -> None:
    """Make what this run has written ready to go on, and throw away what another run has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path, *_files_of_ranks(path)]
    record_file = path.with_suffix(".run.json")
    text = json.dumps(record, indent=1, sort_keys=True)
    if record_file.exists() and record_file.read_text(encoding="utf-8") == text:
        for file in written:
            cut_half_line(file)
        return
    for stale in written:
        stale.unlink(missing_ok=True)
    record_file.write_text(text, encoding="utf-8")


def _files_of_ranks(path: Path) -> list[Path]:
    """Return what processes other than the first have written and nobody has put together yet."""
    return sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))


def _read_answered(path: Path, items: Sequence[Item], *, failed_too: bool = False) -> dict[str, Prediction]:
    """Return by id what is answered, judged anew; a question that has been reworded since is not."""
    found = read_unfinished(path)
    for file in _files_of_ranks(path):
        for name, prediction in read_unfinished(file).items():
            # A later attempt replaces one at which the model failed, and nothing else.
            if name not in found or found[name].fault == MODEL:
                found[name] = prediction
    answered = {}
    for item in items:
        prediction = found.get(item.id)
        if prediction is None or prediction.question != item.question:
            continue
        # What was said is judged again, as metrics may have changed; what failed says nothing.
        if prediction.fault not in (ROW, IMAGE, MODEL):
            answered[item.id] = judge(item, prediction.output, cut_off=prediction.cut_off)
        elif failed_too:
            answered[item.id] = prediction
    return answered


class _Questioner:
    """One process asking its share of the questions.

    Args:
        model: any image-text-to-text model.
        processor: its processor.
        settings: how questions are asked.
        file: what predictions are appended to.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: RunSettings, file: Path):
        self.model = model
        self.processor = processor
        self.settings = settings
        self.file = file

    def ask(self, items: Sequence[Item], progress: str | None) -> None:
        """Ask questions batch by batch, those of like length together."""
        sound: list[Item] = []
        prompts: list[str] = []
        for item in items:
            prompt = self._prompt(item)
            if isinstance(prompt, Prediction):
                append_predictions([prompt], self.file)
            else:
                sound.append(item)
                prompts.append(prompt)
        pictures = [0 if self.settings.blind else len(item.images) for item in sound]
        batches = list(batches_by_length(prompts, pictures, self.settings.batch_size))
        for places in tqdm(batches, desc=progress, disable=progress is None):
            batch = [(sound[place], prompts[place]) for place in places]
            append_predictions(self._answer_batch(batch), self.file)

    def _prompt(self, item: Item) -> str | Prediction:
        """Return the text that the model completes, or the fault for which the question cannot be asked."""
        if item.fault:
            return judge(item, "", ROW, item.fault)
        options = {**item.template_options, **(self.settings.template_options or {})}
        try:
            return rendered(self.processor, item.prompt(self.settings.blind), options)
        except MODEL_ERRORS as error:
            return judge(item, "", MODEL, _one_line(error))

    def _answer_batch(self, batch: Sequence[tuple[Item, str]]) -> list[Prediction]:
        """Return the predictions for questions and their prompts, those with a picture that cannot be read first."""
        failed = []
        sound = []
        for item, prompt in batch:
            try:
                images = [] if self.settings.blind else item.open_images()
            except Dropped as dropped:
                failed.append(judge(item, "", IMAGE, str(dropped)))
            else:
                sound.append((item, prompt, images))
        return failed + self._answer(sound)

    def _answer(self, questions: Sequence[tuple[Item, str, list[Image.Image]]]) -> list[Prediction]:
        """Return the predictions for questions, their prompts and pictures; where the model raises, ask each alone."""
        if not questions:
            return []
        items, prompts, images = zip(*questions, strict=True)
        try:
            completions = complete(
                self.model,
                self.processor,
                prompts,
                images,
                max_new_tokens=self.settings.max_new_tokens,
                max_thinking_tokens=self.settings.max_thinking_tokens,
            )
        except MODEL_ERRORS as error:
            if len(questions) == 1:
                logger.warning("%s failed: %s", items[0].id, _one_line(error))
                return [judge(items[0], "", MODEL, _one_line(error))]
            logger.warning(
                "a batch of %d questions failed and is asked one by one: %s", len(questions), _one_line(error)
            )
            # One of them is at fault, or all together are too large for the memory.
            predictions = []
            for question in questions:
                predictions += self._answer([question])
            return predictions
        predictions = []
        for item, completion in zip(items, completions, strict=True):
            predictions.append(judge(item, completion.text, cut_off=completion.cut_off))
        return predictions


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def fault_report(answers: Mapping[str, Sequence[Prediction]], named: int = 5) -> str:
    """Return lines that count the faults of each model by kind and name the first questions of each; empty where none."""
    lines = []
    for model, predictions in answers.items():
        kinds = Counter(prediction.fault for prediction in predictions if prediction.fault)
        for kind, count in kinds.most_common():
            found = [prediction for prediction in predictions if prediction.fault == kind]
            names = ", ".join(f"{prediction.id} ({prediction.detail})" for prediction in found[:named])
            if count > named:
                names += ", ..."
            consequence = "left out of the scores" if kind in NOT_SCORED else "counted as wrong"
            lines.append(f"{model}: {kind}: {count} of {len(predictions)}, {consequence}: {names}")
    return "\n".join(lines)


def cut_off_note(model: str, predictions: Sequence[Prediction], max_new_tokens: int) -> str:
    """Return a line that counts the answers that the bound on new tokens ended; empty where it ended none."""
    count = sum(prediction.cut_off for prediction in predictions)
    if not count:
        return ""
    unread = sum(prediction.cut_off and not prediction.answer for prediction in predictions)
    return (
        f"{model}: {count} of {len(predictions)} answers were cut off at {max_new_tokens} tokens, {unread} of them before "
        f"an answer, which counts as wrong: pass --max_new_tokens {2 * max_new_tokens}"
    )


def same_questions(
    first: Sequence[Prediction], second: Sequence[Prediction]
) -> tuple[list[Prediction], list[Prediction]]:
    """Return the predictions of two models for the questions that both were scored on, in the first one's order.

    Raises:
        ValueError: there are fewer than two such questions.
    """
    others = {prediction.id: prediction for prediction in second if prediction.scored}
    of_first = []
    of_second = []
    for prediction in first:
        if prediction.scored and prediction.id in others:
            of_first.append(prediction)
            of_second.append(others[prediction.id])
    if len(of_first) < 2:
        raise ValueError(f"the models share {len(of_first)} scored questions; a comparison needs at least 2")
    return of_first, of_second
