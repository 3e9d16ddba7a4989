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
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin

from siq_vl.data.conversations import Dropped
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.generation import batches_by_length, complete, rendered
from siq_vl.evaluation.items import Item
from siq_vl.evaluation.predictions import Prediction
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
    repeated = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} ids are given to several questions, {repeated[0]!r} for one: make them distinct"
        )
    state = process_state()
    with Lock(path, held=state.is_main_process, is_file=True):
        return _run(model, processor, items, path, settings, state, identity or {}, progress)


def _run(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    path: Path,
    settings: RunSettings,
    state: PartialState,
    identity: Mapping[str, object],
    progress: str | None,
) -> list[Prediction]:
    """Ask what is not answered yet; see `run`."""
    parts = [path, *(path.with_suffix(f".rank{rank}.jsonl") for rank in range(1, state.num_processes))]
    described = {
        **identity,
        "blind": settings.blind,
        "max_new_tokens": settings.max_new_tokens,
        "template_options": dict(settings.template_options or {}),
    }
    if settings.max_thinking_tokens is not None:
        described["max_thinking_tokens"] = settings.max_thinking_tokens
    if state.is_main_process:
        _begin(path, described)
    state.wait_for_everyone()
    done = _already(path, items)
    state.wait_for_everyone()  # nobody appends before everybody has read
    todo = [item for item in items if item.id not in done]
    if done and todo and state.is_main_process:
        logger.info("%s: %d of %d questions are answered already", path.stem, len(done), len(items))
    asked = _Asking(model, processor, settings, parts[state.process_index])
    asked.all(todo, state, progress if state.is_main_process else None)
    state.wait_for_everyone()
    if state.is_main_process:
        finished = _already(path, items, failed_too=True)
        kept.write([finished[item.id] for item in items], path)
        for part in path.parent.glob(f"{path.stem}.rank*.jsonl"):
            part.unlink()
    state.wait_for_everyone()
    answered = kept.read(path)
    if answered and all(prediction.fault == kept.MODEL for prediction in answered):
        raise ValueError(f"the model failed at every question; the first time: {answered[0].detail}")
    return answered


def _begin(path: Path, described: Mapping[str, object]) -> None:
    """Make what this run has written ready to go on, and throw away what another run has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path, *path.parent.glob(f"{path.stem}.rank*.jsonl")]
    beside, text = path.with_suffix(".run.json"), json.dumps(described, indent=1, sort_keys=True)
    if beside.exists() and beside.read_text(encoding="utf-8") == text:
        for file in written:
            kept.cut_half_line(file)
        return
    for stale in written:
        stale.unlink(missing_ok=True)
    beside.write_text(text, encoding="utf-8")


def _already(path: Path, items: Sequence[Item], *, failed_too: bool = False) -> dict[str, Prediction]:
    """Return by id what is answered, judged anew; a question that has been reworded since is not."""
    found = kept.read_unfinished(path)
    for part in sorted(path.parent.glob(f"{path.stem}.rank*.jsonl")):
        later = kept.read_unfinished(part)
        found |= {name: made for name, made in later.items() if name not in found or found[name].fault == kept.MODEL}
    done = {}
    for item in items:
        made = found.get(item.id)
        if made is None or made.question != item.question:
            continue
        if made.fault in (kept.ROW, kept.IMAGE, kept.MODEL):
            if failed_too:
                done[item.id] = made
        else:
            done[item.id] = kept.judge(item, made.output)
    return done


class _Asking:
    """One process asking its share of the questions."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: RunSettings, part: Path):
        self.model, self.processor, self.settings, self.part = model, processor, settings, part

    def all(self, items: Sequence[Item], state: PartialState, progress: str | None) -> None:
        """Ask the questions that fall to this process, batch by batch."""
        mine, texts = [], []
        for place, item in enumerate(items):
            if place % state.num_processes != state.process_index:
                continue
            text = self._text(item)
            if isinstance(text, Prediction):
                kept.append([text], self.part)
            else:
                mine.append(item)
                texts.append(text)
        pictures = [0 if self.settings.blind else len(item.images) for item in mine]
        batches = list(batches_by_length(texts, pictures, self.settings.batch_size))
        for batch in tqdm(batches, desc=progress, disable=progress is None):
            kept.append(self.batch([mine[place] for place in batch], [texts[place] for place in batch]), self.part)

    def _text(self, item: Item) -> str | Prediction:
        if item.fault:
            return kept.judge(item, "", kept.ROW, item.fault)
        options = {**item.template_options, **(self.settings.template_options or {})}
        try:
            return rendered(self.processor, item.prompt(self.settings.blind), options)
        except MODEL_ERRORS as error:
            return kept.judge(item, "", kept.MODEL, _named(error))

    def batch(self, items: Sequence[Item], texts: Sequence[str]) -> list[Prediction]:
        """Answer one batch; where the model raises, each of its questions is asked alone."""
        failed, sound = [], []
        for item, text in zip(items, texts, strict=True):
            try:
                sound.append((item, text, [] if self.settings.blind else item.open_images()))
            except Dropped as dropped:
                failed.append(kept.judge(item, "", kept.IMAGE, str(dropped)))
        return failed + self._answered(sound)

    def _answered(self, rows: Sequence[tuple[Item, str, list]]) -> list[Prediction]:
        if not rows:
            return []
        items, texts, images = zip(*rows, strict=True)
        try:
            outputs = complete(
                self.model,
                self.processor,
                texts,
                images,
                max_new_tokens=self.settings.max_new_tokens,
                max_thinking_tokens=self.settings.max_thinking_tokens,
            )
        except MODEL_ERRORS as error:
            if len(rows) > 1:
                logger.warning("a batch of %d questions failed and is asked one by one: %s", len(rows), _named(error))
                return [made for row in rows for made in self._answered([row])]
            logger.warning("%s failed: %s", items[0].id, _named(error))
            return [kept.judge(items[0], "", kept.MODEL, _named(error))]
        return [kept.judge(item, output) for item, output in zip(items, outputs, strict=True)]


def _named(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def fault_report(answers: Mapping[str, Sequence[Prediction]], named: int = 5) -> str:
    """Return lines that count the faults of each model by kind and name the first questions of each; empty where none."""
    lines = []
    for model, made in answers.items():
        kinds = Counter(prediction.fault for prediction in made if prediction.fault)
        for kind, count in kinds.most_common():
            found = [prediction for prediction in made if prediction.fault == kind]
            names = ", ".join(f"{prediction.id} ({prediction.detail})" for prediction in found[:named])
            counted = "left out of the scores" if kind in kept.NOT_SCORED else "counted as wrong"
            lines.append(
                f"{model}: {kind}: {count} of {len(made)}, {counted}: {names}" + (", ..." if count > named else "")
            )
    return "\n".join(lines)


def same_questions(
    first: Sequence[Prediction], second: Sequence[Prediction]
) -> tuple[list[Prediction], list[Prediction]]:
    """Return the predictions of two models for the questions that both were scored on, in the first one's order.

    Raises:
        ValueError: there are fewer than two such questions.
    """
    others = {prediction.id: prediction for prediction in second if prediction.scored}
    pairs = [(made, others[made.id]) for made in first if made.scored and made.id in others]
    if len(pairs) < 2:
        raise ValueError(f"the models share {len(pairs)} scored questions; a comparison needs at least 2")
    return [a for a, _ in pairs], [b for _, b in pairs]
