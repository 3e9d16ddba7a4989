"""
Training steps of SiQ-VL against transformers' own Idefics3 class with equal dimensions and weights.

    python benchmarks/idefics3.py
    python benchmarks/idefics3.py --shape 0.5b --device cuda --rows 256

Both run under a plain `SFTTrainer` with its own collator, on the same rows and with LoRA and projector as in stage 2; the
last line is SiQ-VL with all levers of `benchmarks/training.py`.
"""

import tempfile
from pathlib import Path

import common
import training
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

from siq_vl.export.idefics3 import export_idefics3


def idefics3_twin(model, processor):
    """Return an Idefics3 model that computes what a SiQ-VL model without projector bias computes, and its processor."""
    with tempfile.TemporaryDirectory() as folder:
        export_idefics3(model, processor, Path(folder))
        return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def adapter(options) -> LoraConfig:
    """Return stage 2's adapter for Idefics3's names of the same parts."""
    ours = training.recipe_of(options, options.folder, []).model
    targets = rf".*\.text_model\..*\.({'|'.join(ours.lora_target_modules)})"
    return LoraConfig(r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules=targets, modules_to_save=["connector"])


def variants(options) -> dict:
    """Return Idefics3, SiQ-VL under the same trainer, and SiQ-VL with all levers."""
    twin, twin_processor = idefics3_twin(options.model, options.processor)
    peft_config = adapter(options)

    def native():
        return training.one_run(options, lambda *a: training.plain_trainer(*a, peft_config), twin, twin_processor)

    ours = training.variants(options)
    return {
        "Idefics3, plain TRL": native,
        "SiQ-VL, plain TRL": ours[training.BASELINE],
        "SiQ-VL, all levers": ours["all levers"],
    }


def main() -> None:
    options = training.parse_options(__doc__)
    options.model, options.processor = common.random_model(options.shape, projector_bias=False)
    training.compare(options, variants)


if __name__ == "__main__":
    main()
