"""What happens beside the training steps: freeing memory, and letting the model show what it says."""

import gc
import html
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from trl import SFTTrainer
from trl.models import unwrap_model_for_generation

from siq_vl.evaluation.generation import generate_texts
from siq_vl.html import image_data_url, render
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.sharding import outermost_weights

logger = logging.getLogger(__name__)

SAMPLES_FILE, SAMPLES_PAGE = "samples.jsonl", "samples.html"


class FreeMemoryCallback(TrainerCallback):
    """Collects garbage and empties the accelerator's cache, at intervals and after each evaluation and checkpoint.

    Args:
        every_steps: the interval, in optimizer steps.
    """

    def __init__(self, every_steps: int):
        self.every_steps = every_steps
        self.times = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            self.free()

    def on_evaluate(self, args, state, control, **kwargs):
        self.free()

    def on_save(self, args, state, control, **kwargs):
        self.free()

    def free(self) -> None:
        """Free what nothing refers to any more."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.times += 1


@dataclass(frozen=True)
class Sample:
    """A held-out row as it is shown: its pictures, what was asked, and the answer it has."""

    images: tuple[Image.Image, ...]
    prompt: list[dict]
    wanted: str

    @classmethod
    def from_row(cls, row: Mapping) -> "Sample":
        """Take a row with `images` and `prompt`, `completion` or `messages`, of which the last turn is asked for."""
        if "messages" in row:
            return cls(tuple(row["images"]), list(row["messages"][:-1]), _text_of(row["messages"][-1:]))
        return cls(tuple(row["images"]), list(row["prompt"]), _text_of(row["completion"]))

    @property
    def asked(self) -> str:
        """The text of the whole prompt."""
        return _text_of(self.prompt)


def _text_of(messages: Sequence[Mapping]) -> str:
    contents = [
        [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        for message in messages
    ]
    return "\n".join(part["text"] for content in contents for part in content if part.get("text"))


class HeldOutCallback(TrainerCallback):
    """Lets the model answer the same held-out rows at intervals, before the first step and at the end.

    Greedy decoding draws no random number: training goes on as if nothing had been asked. What becomes of the answers is
    the subclass's matter.

    Args:
        rows: held-out rows, as for training.
        processor: the model's processor.
        every_steps: the interval, in optimizer steps.
        max_new_tokens: bound on an answer.
        batch_size: rows answered together.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        processor: SiQVLProcessor,
        every_steps: int,
        max_new_tokens: int,
        batch_size: int = 8,
    ):
        self.samples = [Sample.from_row(row) for row in rows]
        self.processor = processor
        self.every_steps = every_steps
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.trainer: SFTTrainer | None = None  # set by whoever makes the trainer
        self._last_step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.ask(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            self.ask(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step != self._last_step:
            self.ask(args, state)

    def ask(self, args, state) -> None:
        """Generate the answers of this step, and hand them on; every process does."""
        self._last_step = state.global_step
        self.record(args, state, self._answers())

    def record(self, args, state, answers: Sequence[str]) -> None:
        """Take the answers to `samples`, in their order, on every process."""
        raise NotImplementedError

    def _answers(self) -> list[str]:
        model, accelerator = self.trainer.model_wrapped, self.trainer.accelerator
        was_training = model.training
        with unwrap_model_for_generation(model, accelerator) as unwrapped, outermost_weights(model, accelerator):
            answers = self._generate(unwrapped)
        model.train(was_training)
        return answers

    def _generate(self, model: PreTrainedModel) -> list[str]:
        with self.trainer.compute_loss_context_manager():
            return generate_texts(
                model.eval(),
                self.processor,
                [sample.prompt for sample in self.samples],
                [list(sample.images) for sample in self.samples],
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )


class SampleCallback(HeldOutCallback):
    """Shows what the model says of a few held-out rows as it learns.

    The answers go to the log, to `samples.jsonl` and the page `samples.html` in the output folder, and, as a table of
    pictures, to each tracker that `report_to` names. Arguments as of `HeldOutCallback`.
    """

    def record(self, args, state, answers: Sequence[str]) -> None:
        """Write the answers down, on the first process."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        entries = append_entry(folder / SAMPLES_FILE, {"step": state.global_step, "answers": answers})
        (folder / SAMPLES_PAGE).write_text(samples_page(self.samples, entries), encoding="utf-8")
        for sample, answer in zip(self.samples, answers, strict=True):
            logger.info("step %d, asked %r, says %r, wanted %r", state.global_step, sample.asked, answer, sample.wanted)
        for callback in self.trainer.callback_handler.callbacks:
            send_to_tracker(callback, self.samples, answers, state.global_step)


def append_entry(path: Path, entry: Mapping) -> list[dict]:
    """Add an entry with its `step` to a file of JSON lines, and return all; those of a run that is resumed come again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    entries = [*(kept for kept in earlier if kept["step"] < entry["step"]), dict(entry)]
    path.write_text("".join(json.dumps(kept) + "\n" for kept in entries))
    return entries


def send_to_tracker(callback: TrainerCallback, samples: Sequence[Sample], answers: Sequence[str], step: int) -> None:
    """Send answers, beside their pictures, to the tracker behind one of transformers' callbacks; others are ignored."""
    rows = list(zip(samples, answers, strict=True))
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        lines = ["| picture | asked | says | wanted |", "|---|---|---|---|"]
        for index, (sample, answer) in enumerate(rows):
            cells = (sample.asked, answer, sample.wanted)
            escaped = (" ".join(html.escape(cell).replace("|", "\\|").split()) for cell in cells)
            lines.append(f"| {index} | {' | '.join(escaped)} |")
            if sample.images:
                callback.tb_writer.add_image(f"samples/{index}", _side_by_side(sample.images), step, dataformats="HWC")
        callback.tb_writer.add_text("samples", "\n".join(lines), step)
        callback.tb_writer.flush()
    elif isinstance(callback, WandbCallback):
        wandb = callback._wandb
        table = wandb.Table(columns=["step", "picture", "asked", "says", "wanted"])
        for sample, answer in rows:
            picture = wandb.Image(_side_by_side(sample.images)) if sample.images else None
            table.add_data(step, picture, sample.asked, answer, sample.wanted)
        wandb.log({"samples": table, "train/global_step": step})
    elif isinstance(callback, TrackioCallback):
        import pandas  # comes with trackio

        trackio = callback._trackio
        pictures = [trackio.Image(_side_by_side(s.images)) if s.images else None for s, _ in rows]
        frame = pandas.DataFrame(
            {
                "picture": pictures,
                "asked": [sample.asked for sample, _ in rows],
                "says": [answer for _, answer in rows],
                "wanted": [sample.wanted for sample, _ in rows],
            }
        )
        trackio.log({"samples": trackio.Table(dataframe=frame), "train/global_step": step})


def _side_by_side(images: Sequence[Image.Image]) -> np.ndarray:
    """Return the pictures of a sample in one, as an array of shape `(height, width, 3)`."""
    height = max(image.height for image in images)
    whole = Image.new("RGB", (sum(image.width for image in images), height), "white")
    left = 0
    for image in images:
        whole.paste(image.convert("RGB"), (left, 0))
        left += image.width
    return np.asarray(whole)


def samples_page(samples: Sequence[Sample], entries: Sequence[Mapping]) -> str:
    """Return a self-contained page: each held-out row, and what the model said of it at each step."""
    cards = []
    for index, sample in enumerate(samples):
        answers = []
        for entry in entries:
            # A run that was continued with fewer held-out rows has shorter entries.
            if index < len(entry["answers"]):
                answers.append((entry["step"], entry["answers"][index]))
        pictures = [_picture_address(image) for image in sample.images]
        cards.append({"pictures": pictures, "asked": sample.asked, "answers": answers, "wanted": sample.wanted})
    return render("samples.html.jinja", title="What the model says as it learns", cards=cards)


def _picture_address(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((384, 384))
    return image_data_url(small, "PNG", optimize=True)
