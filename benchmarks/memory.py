"""
Peak memory of training against the prediction of `python -m siq_vl.planning.sizes`.

    python benchmarks/memory.py
    python benchmarks/memory.py --shape 0.5b --device cuda --batch_sizes 1 4 --length 1024

Stage 1, LoRA and QLoRA (stages 2 and 3), with and without gradient checkpointing, by batch size. Two optimizer steps of
the project's trainer, of two accumulated batches each, are run on a batch of fixed size. On a GPU the peak is that of torch's allocator; on a CPU the
profiler's account of every allocation is added up. The profiler, as the prediction, leaves out what is not torch's.
"""

import gc
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import common
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback

from siq_vl.data.figures.rows import training_rows
from siq_vl.planning.sizes import MIB, Memory, count, predicted_memory
from siq_vl.training.arguments import STAGES
from siq_vl.training.quantization import load_quantized
from siq_vl.training.recipes import Recipe, parse_recipe
from siq_vl.training.run import make_trainer

METHODS = {"stage 1": ("1", False), "LoRA": ("2", False), "QLoRA": ("2", True)}
STEPS = 2


@dataclass
class Setting:
    """One training run to measure."""

    method: str
    checkpointing: bool
    batch_size: int


def recipe_of(options, setting: Setting, folder: str) -> Recipe:
    """Return a stage of the tiny recipe with the setting's options."""
    stage, nf4 = METHODS[setting.method]
    settings = {
        "stage": stage,
        "output_dir": folder,
        "max_steps": STEPS,
        "disable_tqdm": True,
        "per_device_train_batch_size": setting.batch_size,
        "effective_batch_size": 0,
        "gradient_accumulation_steps": 2,
        "bf16": options.bf16,
        "dtype": options.dtype,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": setting.checkpointing,
        "logging_steps": 1000,
        "dataloader_num_workers": 0,
    }
    if stage != "1":
        settings |= {"lora_r": options.lora_r, "load_in_4bit": nf4}
    return parse_recipe(STAGES, common.as_options(settings))


def fixed_batch(options, config, batch_size: int) -> dict[str, torch.Tensor]:
    """Return a batch of one picture a row, whose last `supervised` tokens have labels."""
    ids = torch.full((batch_size, options.length), 9)
    ids[:, : config.image_seq_length] = config.image_token_id
    labels = ids.clone()
    labels[:, : options.length - options.supervised] = -100
    side = config.vision_config.image_size
    pixels = torch.rand(batch_size, 3, side, side)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def trainer_of(options, setting: Setting, folder: str):
    """Return the project's trainer for a setting, on a model with random weights."""
    recipe = recipe_of(options, setting, folder)
    model, processor = common.random_model(options.shape)
    dtype = getattr(torch, options.dtype)
    if recipe.model.load_in_4bit:
        model.save_pretrained(f"{folder}/model")
        compute = torch.bfloat16 if options.bf16 else torch.float32
        model = load_quantized(f"{folder}/model", recipe.model, dtype, compute)
    else:
        model = model.to(dtype)
    model.model.projector.float()
    batch = fixed_batch(options, model.config, setting.batch_size)
    rows = training_rows("train", 2 * STEPS * setting.batch_size, "answer")
    trainer = make_trainer(recipe, model, processor, rows)
    trainer.data_collator = lambda rows: dict(batch)
    trainer.remove_callback(PrinterCallback)
    return trainer


def peak_on_cpu(work: Callable[[], object]) -> int:
    """Return the most bytes that torch holds at once while a function runs, beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def nf4_scales(weight: torch.nn.Parameter) -> list[torch.Tensor]:
    """Return the tensors that belong to a weight in NF4, and are neither parameters nor buffers."""
    if type(weight).__name__ != "Params4bit" or weight.quant_state is None:
        return []
    state = weight.quant_state
    nested = [] if state.state2 is None else [state.state2.absmax]
    return [state.absmax, *nested]


def measured_peak(options, setting: Setting) -> int:
    """Return the peak, in bytes, of a training run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, setting, folder)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return torch.cuda.max_memory_allocated()
        tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
        tensors += [scales for weight in trainer.model.parameters() for scales in nf4_scales(weight)]
        gc.collect()  # what an earlier run left must not be freed, and counted, in this one
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) + peak_on_cpu(trainer.train)


def predicted_peak(options, setting: Setting) -> Memory:
    """Return the prediction for the same run."""
    recipe = recipe_of(options, setting, "outputs")
    config, _ = common.random_config(options.shape)
    sizes = count(config, recipe.stage, recipe.model)
    supervised = setting.batch_size * options.supervised
    return predicted_memory(recipe, config, sizes, setting.batch_size, options.length, supervised)


def parse_options():
    """Return the options of the command line."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=384, help="tokens of a row, image tokens included")
    parser.add_argument("--supervised", type=int, default=64, help="tokens of a row that have a label")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the frozen weights")
    parser.add_argument("--parts", action="store_true", help="show the parts of the prediction, too")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.length, options.supervised, options.batch_sizes = 48, 8, [2]
    return options


def main() -> None:
    options = parse_options()
    logging.disable(logging.WARNING)
    methods = list(METHODS) if not options.quick else ["stage 1", "LoRA"]  # NF4 wants layers of 64 inputs
    print(f"{common.environment(options)}\nrows of {options.length} tokens, {options.supervised} of them supervised\n")
    lines: list[list[str]] = []
    errors = []
    for setting in (Setting(*each) for each in product(methods, (False, True), options.batch_sizes)):
        measured, predicted = measured_peak(options, setting), predicted_peak(options, setting)
        error = predicted.total / measured - 1
        cells = [setting.method, "yes" if setting.checkpointing else "no", str(setting.batch_size)]
        lines.append([*cells, f"{measured / MIB:.1f}", f"{predicted.total / MIB:.1f}", f"{error:+.1%}"])
        errors.append(abs(error))
        if options.parts:
            print(lines[-1], {name: round(value / MIB, 1) for name, value in vars(predicted).items()})
    table = common.table(["run", "checkpointing", "batch", "measured MiB", "predicted MiB", "error"], lines)
    print(f"{table}\n\nlargest error: {max(errors):.1%}")
    common.keep(options, {"memory": table}, {"largest error in percent": round(100 * max(errors), 1)})


if __name__ == "__main__":
    main()
