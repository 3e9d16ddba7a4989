"""What a pretrained language model must be able to do on text alone before anybody trains a SiQ-VL on it."""

from collections import defaultdict

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from siq_vl.data.figures import dataset as figures
from siq_vl.data.figures.figure import Question
from siq_vl.pretraining.text import STEP_BY_STEP

# Question types held against the floors below: single look-ups, and sums of two terms reasoned step by step.
LOOK_UP_TYPES = ("value", "color", "text", "location")
LOOK_UP_FLOOR, SUM_FLOOR = 0.95, 0.90
_BATCH = 100


def final_answer(text: str) -> str:
    """Return what stands in the answer tags, or the whole text where there are none."""
    if "<answer>" not in text:
        return text.strip()
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def _described_questions(count: int) -> dict[str, list[tuple[str, Question]]]:
    """Return (description, question) pairs of the test split, at most `count` for each question type."""
    found: dict[str, list] = defaultdict(list)
    for index in range(60 * count):
        sample = figures.sample("test", index, seed=-1)
        rows = found[f"{sample.figure.domain}/{sample.question.type}"]
        if len(rows) < count:
            rows.append((sample.figure.caption, sample.question))
    return found


@torch.no_grad()
def gate_accuracies(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 100
) -> dict[str, dict[str, float]]:
    """Return exact-match accuracies on unseen descriptions.

    Args:
        model: the language model alone, no picture.
        tokenizer: its tokenizer.
        count: questions of each type, at most.

    Returns:
        `"domain/type"` to `{"direct": accuracy, "steps": accuracy, "questions": how many}`, answers greedy.
    """
    model.eval()
    results = {}
    for name, rows in sorted(_described_questions(count).items()):
        results[name] = {"questions": len(rows)}
        for way, suffix in (("direct", ""), ("steps", f" {STEP_BY_STEP}")):
            right = 0
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                prompts = [
                    f"<|im_start|>user\n{text}\n{asked.text}{suffix}<|im_end|>\n<|im_start|>assistant\n"
                    for text, asked in batch
                ]
                inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(
                    model.device
                )
                output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
                texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += sum(final_answer(text) == asked.answer for text, (_, asked) in zip(texts, batch, strict=True))
            results[name][way] = right / len(rows)
    return results


def failures(accuracies: dict[str, dict[str, float]]) -> list[str]:
    """Return the gates that do not hold, as sentences."""
    found = []
    for name, row in accuracies.items():
        kind = name.split("/")[1]
        if kind in LOOK_UP_TYPES and row["steps"] < LOOK_UP_FLOOR:
            found.append(f"{name}: single look-up {row['steps']:.2f}, wanted {LOOK_UP_FLOOR}")
        if kind == "sum" and row["steps"] < SUM_FLOOR:
            found.append(f"{name}: two-term sum with reasoning {row['steps']:.2f}, wanted {SUM_FLOOR}")
    return found
