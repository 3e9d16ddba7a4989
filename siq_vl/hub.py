"""
Model cards of stage checkpoints, and pushing them to the Hub.

    python -m siq_vl.hub outputs/tiny/stage3 --repo_id me/siq-vl-tiny     # a finished checkpoint, with what was measured of it
"""

import argparse
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from siq_vl import cli
from siq_vl.terms import data_sets_of, is_hub_id, licence_for, made_from, terms_table

logger = logging.getLogger(__name__)

STAGE_TITLES = {
    "1": "projector alignment",
    "2": "instruction tuning",
    "3": "chain-of-thought distillation",
}
SCORES_FILE = "scores.json"
CURVE_FILE, EMERGENCE_FIGURE = "learning_curve.svg", "emergence.svg"
BEFORE_AFTER_FILE = "before_after.md"

# A trainer's own checkpoints and logs, and pictures of held-out data, stay at home.
NOT_PUSHED = [
    "checkpoint-*",
    "checkpoint-*/**",
    ".incomplete/**",
    "runs/**",
    "wandb/**",
    "trackio/**",
    "samples.*",
    ".lock",
]
_ATTEMPTS = 5
_WAIT_SECONDS = 2.0
# What the library under huggingface_hub raises where no answer comes: requests' errors are OSErrors, httpx's have this
# class in common with answers that tell of an error.
_FAILURES: tuple[type[Exception], ...] = (HfHubHTTPError, OSError, RuntimeError, HfHubHTTPError.__bases__[0])
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)

_CARD = """\
---
{metadata}
---

# SiQ-VL, stage {stage}: {title}

A SigLIP vision tower, a pixel-shuffle projector and a {decoder} language model, after stage {stage} ({title}) of recipe
`{recipe}`.
{warning}
```python
from transformers import AutoModelForImageTextToText, AutoProcessor  # AutoModelForVision2Seq on transformers 4

model = AutoModelForImageTextToText.from_pretrained({load}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({load}, trust_remote_code=True)
```

## Recipe

| setting | value |
|---|---|
{rows}

All settings are in `training_settings.json`, the loss log in `training_log.jsonl`.{adapter_note}
{sections}"""

_TERMS = """\
The licence above, `{licence}`, is the narrowest of those that this checkpoint was made from, by a table that was put together
from their public pages. It is no legal advice: read the terms themselves."""

_RANDOM_WARNING = """
> **Random weights.** This model was built from the sizes of its backbones, not from their weights, to measure speed and
> memory. Its answers mean nothing.
"""


def model_card(
    settings: dict,
    *,
    has_curve: bool = False,
    has_emergence: bool = False,
    before_after: str = "",
    scores: Mapping[str, Mapping[str, float]] | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> str:
    """Return the README.md of a stage checkpoint, from its `training_settings.json`.

    Args:
        settings: the settings that training left.
        has_curve: whether `learning_curve.svg` lies beside the card.
        has_emergence: whether `emergence.svg` lies there.
        before_after: table of a baseline beside this model, as Markdown.
        scores: by benchmark, its metrics by name.
        repo_id: where the checkpoint is pushed, for the lines that load it.
        revision: the branch it is pushed to.
    """
    adapter = settings["adapter"]
    load = f'"{repo_id or "path/to/this"}"' + (f', revision="{revision}"' if revision not in (None, "main") else "")
    return _CARD.format(
        metadata=_metadata(settings, scores or {}, repo_id).to_yaml().strip(),
        stage=settings["stage"],
        title=STAGE_TITLES[settings["stage"]],
        recipe=settings["recipe"],
        decoder=settings.get("decoder", "decoder-only"),
        warning=_RANDOM_WARNING if settings["model"].get("random_weights") else "",
        load=load,
        rows="\n".join(f"| {name} | {value} |" for name, value in _facts(settings).items()),
        adapter_note=f" The adapter is in `adapter/`. {settings.get('merged_into') or ''}" if adapter else "",
        sections=_sections(settings, has_curve, has_emergence, before_after, scores or {}),
    )


def _facts(settings: dict) -> dict[str, object]:
    training, adapter = settings["training"], settings["adapter"]
    batch, accumulation = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    processes = settings.get("processes", 1)
    facts = {
        "steps": settings["steps"],
        "samples a step": settings.get("effective_batch_size", batch * accumulation),
        "batch size a device x accumulation x processes": f"{batch} x {accumulation} x {processes}",
        "learning rate": training["learning_rate"],
        "LoRA": _lora(adapter) if adapter else "none: the projector alone trains",
        "final training loss": settings["final_loss"],
        "seconds of training": settings["seconds"],
        "seed": training["seed"],
    }
    if best := settings.get("best"):
        facts["weights kept"] = ", ".join(f"{name} {value:g}" for name, value in best.items())
    speed = settings.get("speed") or {}
    for name in ("samples_per_second", "tokens_per_second"):
        if speed.get(name):
            facts[name.replace("_", " ")] = speed[name]
    for place, gib in (speed.get("peak_memory_gib") or {}).items():
        facts[f"peak memory, {place}"] = f"{gib} GiB"
    return facts


def _lora(adapter: dict) -> str:
    base = ""
    if adapter.get("load_in_8bit"):
        base = ", on an int8 base (QLoRA)"
    elif adapter.get("load_in_4bit"):
        # Settings of earlier versions do not name the type, which was this.
        base = f", on an {adapter.get('bnb_4bit_quant_type', 'nf4').upper()} base (QLoRA)"
    vision = ", on the vision tower too" if adapter.get("vision_lora") else ""
    unfrozen = adapter.get("unfreeze_vision_layers")
    if unfrozen:
        vision = f", last {unfrozen} layers of the vision tower unfrozen"
    return f"r={adapter['lora_r']}, alpha={adapter['lora_alpha']}, dropout={adapter['lora_dropout']}{base}{vision}"


def _sections(
    settings: dict,
    has_curve: bool,
    has_emergence: bool,
    before_after: str,
    scores: Mapping[str, Mapping[str, float]],
) -> str:
    sections = []
    if before_after:
        sections.append(f"## Before and after\n\n{before_after.strip()}\n")
    if has_curve:
        sections.append("## Learning curve\n\n![training loss](learning_curve.svg)\n")
    if has_emergence:
        sections.append("## How reasoning emerged\n\n![where, how long, how structured](emergence.svg)\n")
    if scores:
        lines = [
            f"| {name} | {metric} | {value} |" for name, metrics in scores.items() for metric, value in metrics.items()
        ]
        sections.append("\n".join(["## Scores\n", "| benchmark | metric | value |", "|---|---|---|", *lines, ""]))
    if table := settings.get("data_table"):
        sections.append(f"## Data\n\n{table}\n")
    if table := terms_table(made_from(settings)):
        sections.append(f"## Terms\n\n{_TERMS.format(licence=licence_for(made_from(settings)))}\n\n{table}\n")
    return "".join(f"\n{section}" for section in sections)


def _metadata(settings: dict, scores: Mapping[str, Mapping[str, float]], repo_id: str | None) -> ModelCardData:
    sources = settings["data"].get("sources") or []
    paths = [source["path"] for source in sources if isinstance(source, Mapping) and source.get("path")]
    licence = licence_for(made_from(settings))
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=name.lower().replace(" ", "-"),
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
        )
        for name, metrics in scores.items()
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=licence,
        license_name="terms-of-its-sources" if licence == "other" else None,
        base_model=sorted({name for name in (settings.get("backbones") or {}).values() if is_hub_id(name)}) or None,
        datasets=sorted({*filter(is_hub_id, paths), *data_sets_of(made_from(settings))}) or None,
        tags=["siq-vl", "vision-language", f"stage-{settings['stage']}"],
        model_name=repo_id or f"SiQ-VL {settings['recipe']} stage {settings['stage']}" if results else None,
        eval_results=results or None,
    )


def write_card(
    folder: Path, *, repo_id: str | None = None, revision: str | None = None, before_after: str | None = None
) -> None:
    """Write a stage checkpoint's model card from what lies in its folder: settings, figures, scores, comparison.

    Args:
        folder: the checkpoint.
        repo_id: where it is pushed, for the lines that load it.
        revision: the branch it is pushed to.
        before_after: table of a baseline beside this model, kept in `before_after.md`; by default what is kept there.

    Raises:
        ValueError: the folder is not what a stage left.
    """
    path = folder / "training_settings.json"
    if not path.exists():
        raise ValueError(f"{folder} has no training_settings.json: a card is written for what a training stage left")
    if before_after is not None:
        (folder / BEFORE_AFTER_FILE).write_text(before_after.strip() + "\n", encoding="utf-8")
    kept = folder / BEFORE_AFTER_FILE
    scores = folder / SCORES_FILE
    card = model_card(
        json.loads(path.read_text(encoding="utf-8")),
        has_curve=(folder / CURVE_FILE).exists(),
        has_emergence=(folder / EMERGENCE_FIGURE).exists(),
        before_after=kept.read_text(encoding="utf-8") if kept.exists() else "",
        scores=json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else None,
        repo_id=repo_id,
        revision=revision,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def push_stage(
    folder: Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    attempts: int = _ATTEMPTS,
    wait_seconds: float = _WAIT_SECONDS,
) -> str:
    """Push a stage's checkpoint to the Hub (to `HF_ENDPOINT`, where that is set) and return the address of the commit.

    Args:
        folder: the checkpoint; a `scores.json` in it, `{benchmark: {metric: value}}`, goes into the model card.
        repo_id: the repository; by default the recipe's name, under the token's own account.
        revision: the branch, made where there is none; by default `stage-<n>`.
        private: whether a new repository is private; by default the account's setting.
        token: access token; by default `HF_TOKEN`, or the one `hf auth login` left.
        attempts: how often to try a request that fails for a passing reason.
        wait_seconds: pause after the first failure; doubled after each.

    Raises:
        ValueError: the folder holds no checkpoint, or the Hub refuses the push.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no checkpoint (no config.json): train it first")
    settings = json.loads((folder / "training_settings.json").read_text())
    revision = revision or f"stage-{settings['stage']}"
    api = HfApi(token=token)

    def patiently(request, **arguments):
        return _with_retries(request, arguments, token, attempts, wait_seconds)

    created = patiently(api.create_repo, repo_id=repo_id or settings["recipe"], private=private, exist_ok=True)
    if revision != "main":
        patiently(api.create_branch, repo_id=created.repo_id, branch=revision, exist_ok=True)
    write_card(folder, repo_id=created.repo_id, revision=revision)
    commit = patiently(
        api.upload_folder,
        repo_id=created.repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=f"Stage {settings['stage']} of recipe {settings['recipe']}",
        ignore_patterns=NOT_PUSHED,
    )
    logger.info("pushed %s to %s, revision %s", folder, created.repo_id, revision)
    return str(commit.commit_url)


def _with_retries(request, arguments: dict, token: str | None, attempts: int, wait_seconds: float):
    for attempt in range(1, attempts + 1):
        try:
            return request(**arguments)
        except _FAILURES as error:
            message = _without_token(f"{type(error).__name__}: {' '.join(str(error).split())}", token)
            answer = error.response if isinstance(error, HfHubHTTPError) else None
            status = None if answer is None else answer.status_code  # an answer that tells of an error is falsy
            if status is not None and status not in _TRANSIENT:
                raise ValueError(
                    f"the Hub refuses {request.__name__} ({message}): check the repository's name and that the token "
                    "may write to it"
                ) from None
            if attempt == attempts:
                raise ValueError(
                    f"{request.__name__} failed {attempts} times ({message}): the checkpoint is complete on disk; "
                    "run the same command again to push it"
                ) from None
            pause = wait_seconds * 2 ** (attempt - 1)
            logger.warning("%s failed (%s); trying again in %.1f s", request.__name__, message, pause)
            time.sleep(pause)
    raise ValueError(f"attempts is {attempts}; it must be at least 1")


def _without_token(text: str, token: str | None) -> str:
    return text.replace(token, "<token>") if token else text


def main() -> None:
    """Push a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what a stage left")
    parser.add_argument("--repo_id", help="by default the recipe's name, under the token's own account")
    parser.add_argument("--revision", help="a branch; stage-<n> by default")
    parser.add_argument("--private", action="store_true", default=None, help="where the repository is a new one")
    options = parser.parse_args()
    cli.say(push_stage(options.folder, repo_id=options.repo_id, revision=options.revision, private=options.private))


if __name__ == "__main__":
    cli.run(main)
