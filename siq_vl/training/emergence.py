"""Watching reasoning emerge: where the model reasons, how long, how structured, and with what result."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from siq_vl.data.figures.dataset import DOMAINS, STYLES, sample
from siq_vl.data.figures.rows import row
from siq_vl.distill.training_rows import DIRECT, TrainingTraces
from siq_vl.evaluation.emergence_figure import EMERGENCE_FILE
from siq_vl.evaluation.metrics import step_score
from siq_vl.hub import EMERGENCE_FIGURE
from siq_vl.parsing.answers import Parsed, agrees, parse
from siq_vl.plots import emergence_plot
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.callbacks import HeldOutCallback, append_entry
from siq_vl.training.recipes import Recipe

_BATCH = 64


def watched_rows(recipe: Recipe, traces: TrainingTraces) -> list[Mapping]:
    """Return the held-out rows that `emergence_steps` measures the reasoning on, `emergence_count` at most.

    For the scripted oracle these are the first figures of the validation split, the same for every run, with the
    rationales of the run's styles in turn. For other teachers, and for a text-only student, they are the first of the
    questions that `validation_share` keeps from training.
    """
    count, config = recipe.run.emergence_count, recipe.traces
    if not recipe.run.emergence_steps:
        return []
    teachers = list(config.weights) or [each.name for each in traces.report.sources if each.name != DIRECT]
    styles = [name.removeprefix("figures-") for name in teachers]
    if config.student == "multimodal" and set(styles) <= set(STYLES):
        drawn = [sample("validation", index) for index in range(count)]
        # Domains come in turn too: each style has some of every one.
        taken = [styles[index // len(DOMAINS) % len(styles)] for index in range(count)]
        blind = recipe.data.blind
        return [row(each, "reason", style=style, blind=blind) for each, style in zip(drawn, taken, strict=True)]
    if traces.validation is None:
        return []
    rows = (traces.validation[index] for index in range(len(traces.validation)))
    return list(islice(filter(_reasons, rows), count))


def _reasons(row: Mapping) -> bool:
    return (row.get("chat_template_kwargs") or {}).get("enable_thinking", True)


class EmergenceCallback(HeldOutCallback):
    """Measures the model's reasoning on held-out questions at intervals, before the first step and at the end.

    The measures of `emergence` go to the trainer's log, and so to its trackers, as `emergence/<name>`; to
    `emergence.jsonl` in the output folder, one entry a step; and into the figure `emergence.svg`. They change nothing in
    training. An answer may be half as long again as the teacher's longest.

    Args:
        rows: held-out questions with the teacher's rationale, each a row with `images`, `prompt` and `completion`
            `<think>…</think><answer>…</answer>`. Rows that ask for no reasoning are left out.
        processor: the model's processor.
        every_steps: the interval, in optimizer steps.

    Raises:
        ValueError: no row has a rationale.
    """

    def __init__(self, rows: Sequence[Mapping], processor: SiQVLProcessor, every_steps: int):
        rows = list(filter(_reasons, rows))
        super().__init__(rows, processor, every_steps, 0, _BATCH)
        self.teachers = [parse(sample.wanted) for sample in self.samples]
        if not any(teacher.rationale for teacher in self.teachers):
            raise ValueError(
                f"none of the {len(rows)} held-out rows has a rationale to compare with: emergence_steps needs rows whose "
                "completion is <think>…</think><answer>…</answer>, or set it to 0"
            )
        longest = max(_tokens(sample.wanted, processor.tokenizer) for sample in self.samples)
        self.max_new_tokens = longest + longest // 2 + 16

    def on_step_end(self, args, state, control, **kwargs):
        # The last step's entry is made here: a best checkpoint may be restored before training ends.
        if state.global_step % self.every_steps == 0 or state.global_step >= state.max_steps:
            self.ask(args, state)

    def record(self, args, state, answers: Sequence[str]) -> None:
        measures = emergence(answers, self.teachers, self.processor.tokenizer)
        self._log({f"emergence/{name}": value for name, value in measures.items() if name != "count"})
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            entries = append_entry(folder / EMERGENCE_FILE, {"step": state.global_step, **measures})
            (folder / EMERGENCE_FIGURE).write_text(emergence_plot({"student": entries}), encoding="utf-8")

    def _log(self, measures: dict[str, float]) -> None:
        """Log without a trace in the training: neither its running means nor the loss that is due are touched."""
        trainer = self.trainer
        training, due = trainer.model.training, trainer.control.should_log
        trainer.model.eval()  # TRL adds the means of the mode it is in, and forgets them
        trainer.log(measures)
        trainer.model.train(training)
        trainer.control.should_log = due


def emergence(
    answers: Sequence[str], teachers: Sequence[Parsed], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Return what a model's answers say of its reasoning, beside the teacher's, as means over the questions.

    Args:
        answers: the model's whole outputs.
        teachers: the teacher's output to each question, taken apart; its answer is the gold one.
        tokenizer: the student's.

    Returns:
        `well_formed`, the share of answers `<think>…</think><answer>…</answer>`; `length` and `teacher_length`, tokens of
        the rationales; `steps_found`, `steps_in_order` and `arithmetic`, and their mean `structure`, see
        `metrics.step_score`; `accuracy`; and `count`, the number of questions.
    """
    totals: dict[str, float] = {}
    for answer, teacher in zip(answers, teachers, strict=True):
        output = parse(answer)
        steps = step_score(answer, teacher.rationale)
        measured = {
            "well_formed": float(output.well_formed),
            "length": _tokens(output.rationale, tokenizer),
            "teacher_length": _tokens(teacher.rationale, tokenizer),
            "steps_found": steps["found"],
            "steps_in_order": steps["in_order"],
            "arithmetic": steps["arithmetic"],
            "structure": steps["score"],
            "accuracy": float(bool(agrees(output.answer, teacher.answer))),
        }
        for name, value in measured.items():
            totals[name] = totals.get(name, 0) + value
    means = {name: round(total / len(answers), 4) for name, total in totals.items()}
    return {**means, "count": len(answers)}


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
