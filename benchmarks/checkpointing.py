"""
What a step of stage 1 costs with gradient checkpointing, whose frozen tower is not to be differentiated.

    python benchmarks/checkpointing.py --clock cpu --shape small-512

The baseline runs the tower without a graph, so that nothing of it can be computed again. The last line hooks the tower's
patch embedding and checkpoints its layers, as transformers 5 does of itself.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import common
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

QUESTION = "What is shown in this picture, and where is it? Answer with a few words."


def batch_of(model, processor, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return the inputs of a step: a picture and a text a row."""
    side = model.config.vision_config.image_size
    pictures = list(torch.randint(0, 256, (options.batch_size, side, side, 3), dtype=torch.uint8).numpy())
    text = f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}"
    inputs = processor(images=pictures, text=[text] * options.batch_size, return_tensors="pt")
    return {**inputs.to(options.device), "labels": inputs["input_ids"].to(options.device)}


def without_graph(model) -> None:
    """Let the tower run without a graph."""
    tower = model.model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)


def hooked(model) -> None:
    """Do to the tower what transformers 5 does of itself."""
    tower = model.model.vision_tower
    for layer in tower.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    tower.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


def step(options: argparse.Namespace, start, change: Callable | None, checkpointing: bool) -> common.Figures:
    """Return the seconds of one step, the mean of several after one that does not count."""
    model = copy.deepcopy(start[0]).to(options.device).train()
    inputs = batch_of(model, start[1], options)
    model.requires_grad_(False)
    model.model.projector.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if change is not None:
        change(model)
    for counted in range(options.steps + 1):
        if counted == 1:
            seconds = common.stopwatch(options)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
    return {"a step of stage 1": seconds() / options.steps}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of one measurement")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.batch_size, options.steps = 2, 1
    start = common.random_model(options.shape)
    variants = {
        "tower without a graph": (without_graph, True),
        "checkpointing as it is": (None, True),
        "tower hooked and checkpointed": (hooked, True),
        "no checkpointing": (None, False),
    }
    measured = common.interleaved(
        {name: partial(step, options, start, *variant) for name, variant in variants.items()}, options.repetitions
    )
    print(common.environment(options) + "\n")
    figure = "a step of stage 1"
    common.show(options, {figure: common.ratio_table(measured, figure, "s", lower_is_better=True)})


if __name__ == "__main__":
    main()
