"""
Training steps of SiQ-VL against transformers' own Idefics3 class with equal dimensions and weights.

    python benchmarks/idefics3.py
    python benchmarks/idefics3.py --shape 0.5b --device cuda --rows 256

Both run under a plain `SFTTrainer` with its own collator, on the same rows and with LoRA and projector as in stage 2; the
last line is SiQ-VL with all levers of `benchmarks/training.py`.
"""

from functools import partial

import common
import training
from peft import LoraConfig


def adapter(options) -> LoraConfig:
    """Return stage 2's adapter for Idefics3's names of the same parts."""
    ours = training.recipe_of(options, options.folder, {}).model
    targets = rf".*\.text_model\..*\.({'|'.join(ours.lora_target_modules)})"
    return LoraConfig(r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules=targets, modules_to_save=["connector"])


def variants(options) -> dict:
    """Return Idefics3, SiQ-VL under the same trainer, and SiQ-VL with all levers."""
    twin, twin_processor = common.idefics3_twin(options.model, options.processor)
    native_trainer = partial(training.plain_trainer, peft_config=adapter(options))
    ours = training.variants(options)
    return {
        "Idefics3, plain TRL": partial(training.one_run, options, native_trainer, twin, twin_processor),
        "SiQ-VL, plain TRL": ours[training.BASELINE],
        "SiQ-VL, all levers": ours["all levers"],
    }


def main() -> None:
    options = training.parse_options(__doc__)
    options.model, options.processor = common.random_model(options.shape, projector_bias=False)
    training.compare(options, variants)


if __name__ == "__main__":
    main()
