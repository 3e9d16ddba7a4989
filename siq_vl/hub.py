"""Model cards of stage checkpoints."""

STAGE_TITLES = {
    "1": "projector alignment",
    "2": "instruction tuning",
    "3": "chain-of-thought distillation",
}
_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- siq-vl
- vision-language
- stage-{stage}
---

# SiQ-VL, stage {stage}: {title}

A SigLIP vision tower, a pixel-shuffle projector and a Qwen2 language model, after stage {stage} ({title}) of recipe
`{recipe}`.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor  # AutoModelForVision2Seq on transformers 4

model = AutoModelForImageTextToText.from_pretrained("path/to/this", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("path/to/this", trust_remote_code=True)
```

| setting | value |
|---|---|
| steps | {steps} |
| batch size a device x accumulation | {batch} x {accumulation} |
| learning rate | {learning_rate} |
| LoRA | {lora} |
| final training loss | {final_loss} |
| seconds of training | {seconds} |
| seed | {seed} |

All settings are in `training_settings.json`, the loss curve in `training_log.jsonl`.{adapter_note}{data}
"""


def model_card(settings: dict, data_table: str | None = None) -> str:
    """Return the README.md of a stage checkpoint, from its `training_settings.json` and a table of its data."""
    training, adapter = settings["training"], settings["adapter"]
    return _CARD.format(
        stage=settings["stage"],
        title=STAGE_TITLES[settings["stage"]],
        recipe=settings["recipe"],
        steps=settings["steps"],
        batch=training["per_device_train_batch_size"],
        accumulation=training["gradient_accumulation_steps"],
        learning_rate=training["learning_rate"],
        lora=f"r={adapter['lora_r']}, alpha={adapter['lora_alpha']}" if adapter else "none: the projector alone trains",
        final_loss=settings["final_loss"],
        seconds=settings["seconds"],
        seed=training["seed"],
        adapter_note=" The adapter that was merged is in `adapter/`." if adapter else "",
        data=f"\n\n## Data\n\n{data_table}" if data_table else "",
    )
