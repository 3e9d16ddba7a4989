"""
`evaluate.load("metrics/rationales", "cot_length")`, from the repo's root and offline: how whole outputs reason.

The configurations are `cot_length`, `format_rate`, `mixed_language`, `repetition` and `structure_score`, and against a
reference text `rouge_l` and `step_score`, against the question `ignored_instruction`.
"""

import datasets
import evaluate

from siq_vl.evaluation.metrics import METRICS

CITATIONS = {
    "cot_length": "",
    "format_rate": "DeepSeek-AI 2025, DeepSeek-R1",
    "ignored_instruction": "",
    "mixed_language": "",
    "repetition": "Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, ICLR",
    "rouge_l": "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
    "step_score": "",
    "structure_score": "",
}
_INPUTS = """
Args:
    predictions: whole outputs, one a sample; of `rouge_l` any texts.
    references: of `rouge_l` and `step_score`, a reference text or rationale for each; of `ignored_instruction`, the question.
    unit: of `cot_length`, `pieces` (default: words, numbers and punctuation marks), `words` or `characters`.
    language: of `mixed_language`, code of the wanted language (default en).
Returns:
    `cot_length`: `mean`, `std`, `min`, `p10`, `median`, `p90`, `max`, `without` (share of outputs without a rationale);
    `format_rate`: `format_rate`;
    `ignored_instruction`: `ignored_instruction_rate` and its three parts, `kind`, `long`, `described`;
    `mixed_language`: `mixed_language_rate`;
    `repetition`: `loop_rate`, `rep_4`;
    `rouge_l`: `rouge_l` (F1), `precision`, `recall`;
    `step_score`: `step_score` and its three parts, `found`, `in_order`, `arithmetic`;
    `structure_score`: `structure_score` and its five parts, `tags`, `rationale`, `answer`, `steps`, `conclusion`;
    and of each `per_sample`: what each sample adds to these, in order.
"""


class Rationales(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        name = self.config_name
        if name not in CITATIONS:
            raise ValueError(f"config_name is {name!r}; pass one of {', '.join(CITATIONS)} after the module's path")
        columns = {"predictions": datasets.Value("string")}
        if METRICS[name].reference:
            columns["references"] = datasets.Value("string")
        return evaluate.MetricInfo(
            description=METRICS[name].score.__doc__,
            citation=CITATIONS[name],
            inputs_description=_INPUTS,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions, references=None, **options) -> dict:
        return METRICS[self.config_name].compute(predictions, references, **options)
