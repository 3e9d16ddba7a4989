"""
What one way of training does on this machine: samples, tokens and FLOPs a second, and peak memory.

    python benchmarks/step.py --stage 2 --batching packed
    python benchmarks/step.py --device cuda --shape 0.5b --stage 3 --method QLoRA --attn_implementation flash_attention_2

Random weights, rows of short answers and long captions (stage 3: of rationales) with a picture each, through the
project's own trainer and data loader, as the recipes have it. Steps before `--warm_up` do not count. `benchmarks/gpu.py`
runs it for every way there is, each in a process of its own.
"""

import logging
import tempfile
from pathlib import Path

import common
import torch
from fits import step_flops
from memory import peak_on_cpu
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.utils import get_peak_flops

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.planning.sizes import count
from siq_vl.training.arguments import STAGES
from siq_vl.training.quantization import load_quantized
from siq_vl.training.recipes import Recipe, parse_recipe
from siq_vl.training.run import make_trainer

GIB = 2**30
METHODS = ("LoRA", "QLoRA")  # of stages 2 and 3
LONG_SHARES = {"1": 1.0, "2": 0.25, "3": 1.0}  # of a stage's rows: captions, mostly short answers, rationales


class StepTimes(TrainerCallback):
    """Notes when each optimizer step ends."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        common.synchronize(self.device)
        self.ends.append(common.CLOCKS["wall"]())


def recipe_of(options, folder: Path) -> Recipe:
    """Return a stage of the tiny recipe with the settings to be measured."""
    settings = {
        "stage": options.stage,
        "recipe": "tiny",
        "output_dir": folder / "run",
        "max_steps": options.warm_up + options.steps,
        "num_train_epochs": 1000,
        "per_device_train_batch_size": options.batch_size,
        "effective_batch_size": options.batch_size,
        "gradient_checkpointing": str(options.checkpointing).lower(),
        "batching": options.batching,
        "pack_tokens": options.pack_tokens,
        "pack_buffer": options.batch_size,
        "feature_cache": "on" if options.cached else "off",
        "feature_cache_dir": folder / "features",
        "bf16": str(options.bf16).lower(),
        "torch_compile": str(options.compile).lower(),
        "use_cpu": str(options.device == "cpu").lower(),
        "dataloader_pin_memory": str(options.device == "cuda").lower(),
        "dataloader_num_workers": options.workers,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "logging_steps": 1000,
        "disable_tqdm": "true",
    }
    if options.stage != "1":
        settings |= {"lora_r": options.lora_r, "load_in_4bit": str(options.method == "QLoRA").lower()}
    recipe = parse_recipe(STAGES, common.as_options(settings))
    recipe.data.sources = [SourceConfig(str(options.rows_file))]
    recipe.traces = None
    return recipe


def model_of(options, recipe: Recipe, folder: Path):
    """Return a model with random weights as the stage holds it, and its processor."""
    model, processor = common.random_model(options.shape)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if recipe.model.load_in_4bit:
        model.save_pretrained(folder / "model")
        model = load_quantized(str(folder / "model"), recipe.model, dtype, dtype)
    else:
        model = model.to(dtype)
    model.model.projector.float()
    if options.attn_implementation:
        model.set_attn_implementation(options.attn_implementation)
    return model, processor


def operations(options, config, rows, collate, adapter) -> tuple[int, int]:
    """Return the floating-point operations of all rows, once each, and their tokens."""
    lora = count(config, options.stage, adapter).lora
    flops = tokens = 0
    for row in rows:
        batch = collate([row])
        length, supervised = batch["input_ids"].shape[1], int((batch["labels"] != -100).sum())
        flops += step_flops(config, 1, length, supervised, lora, stored_features=options.cached)
        tokens += length
    return flops, tokens


def measured(options, folder: Path) -> dict[str, float | int | str | None]:
    """Train and return what was measured.

    Returns:
        `samples/s`, `tokens/s` (padding not counted), `MFU` (share of the GPU's peak in bfloat16 that the model's
        operations take, of the tower only where it runs; None where the peak is not known), `peak GiB`, `seconds a step`, `loss`.
    """
    recipe = recipe_of(options, folder)
    model, processor = model_of(options, recipe, folder)
    mixture = build_mixture(recipe.data, "answer", None, processor=processor, places=[common.REPO_ROOT])
    config = model.config
    flops, tokens = operations(options, config, mixture.rows, ConversationCollator(processor, None), recipe.model)
    trainer = make_trainer(recipe, model, processor, mixture.rows)
    times = StepTimes(options.device)
    trainer.add_callback(times)
    trainer.remove_callback(PrinterCallback)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_on_cpu(trainer.train)
    seconds = (times.ends[-1] - times.ends[options.warm_up - 1]) / options.steps
    samples = options.batch_size / seconds
    most = get_peak_flops(torch.cuda.get_device_name(), "bfloat16") if options.device == "cuda" else None
    return {
        "samples/s": samples,
        "tokens/s": samples * tokens / len(mixture.rows),
        "MFU": None if most is None else samples * flops / len(mixture.rows) / most,
        "peak GiB": peak / GIB,
        "seconds a step": seconds,
        "loss": trainer.state.log_history[-1]["train_loss"],
        "attention": model.config.text_config._attn_implementation,
    }


def profiled(options, folder: Path) -> str:
    """Return a table of what a step spends its time on, after a training of a few steps."""
    options.steps = 2
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        measured(options, folder)
    order = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    lines = [["operation", "calls", "milliseconds"]]
    events = sorted(profiler.key_averages(), key=lambda event: -_self_time(event, options.device))
    for event in events[:20]:
        lines.append([event.key[:80], str(event.count), f"{_self_time(event, options.device) / 1000:.1f}"])
    return common.table(lines[0], lines[1:]) + f"\n\nby {order}"


def _self_time(event, device: str) -> float:
    """Return an operation's own microseconds on the device."""
    return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total


def _cell(value: float | str | None) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else f"{value:.4g}"


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--stage", choices=STAGES, default="2")
    parser.add_argument("--method", choices=METHODS, default="LoRA", help="of stages 2 and 3")
    parser.add_argument("--batching", choices=("padded", "length_grouped", "packed"), default="padded")
    parser.add_argument("--pack_tokens", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--attn_implementation", default="", help="of the language model; by default the model's own")
    parser.add_argument("--cached", action="store_true", help="stored features in place of pixels")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch_compile")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16, help="samples an optimizer step, all at once")
    parser.add_argument("--steps", type=int, default=8, help="steps that count")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read rows")
    parser.add_argument("--profile", action="store_true", help="print what the time goes to instead")
    options = common.prepare(parser.parse_args())
    if options.warm_up < 1:
        raise ValueError(f"warm_up is {options.warm_up}; it must be at least 1: the first step has no step before it")
    if options.quick:
        options.rows, options.batch_size, options.steps, options.lora_r = 4, 2, 2, 4
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        options.rows_file = common.write_rows(place, options.rows, long_share=LONG_SHARES[options.stage])
        if options.profile:
            table = profiled(options, place)
            print(table)
            common.keep(options, {"profile": table.split("\n\n")[0]})
            return
        figures = measured(options, place)
    table = common.table(list(figures), [[_cell(value) for value in figures.values()]])
    print(table)
    common.keep(options, {"step": table}, figures)


if __name__ == "__main__":
    main()
