"""
Generation of SiQ-VL against transformers' own Idefics3 class with equal dimensions and weights.

    python benchmarks/generation.py                                     # CPU: one prompt, and a batch
    python benchmarks/generation.py --compile                           # the static cache's step compiled, too
    python benchmarks/generation.py --shape 0.5b --device cuda --batch_sizes 1 32

One picture and one question a row, greedy, with a fixed number of new tokens. Time to the first token is that of a call
for one token, which encodes the picture and reads the prompt; tokens a second are those of the steps after it.
"""

import argparse
from functools import partial

import common
import torch
from PIL import Image

from siq_vl.data.figures.rows import user_turn

QUESTION = "What is shown in this picture, and where is it? Answer with a few words."


def prepared(model, processor, batch_size: int, options: argparse.Namespace, *, nested: bool) -> dict:
    """Return the inputs of a batch, on the model's device.

    Args:
        model: that they are for.
        processor: its processor.
        batch_size: rows.
        options: of the benchmark.
        nested: whether the processor takes a list of pictures for each row.
    """
    side = model.config.vision_config.image_size
    noise = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8)
    pictures: list = [Image.fromarray(each.numpy()) for each in noise]
    if nested:
        pictures = [[picture] for picture in pictures]
    text = processor.apply_chat_template(user_turn(QUESTION), add_generation_prompt=True)
    inputs = processor(images=pictures, text=[text] * batch_size, padding=True, return_tensors="pt")
    return dict(inputs.to(options.device, model.dtype))


@torch.inference_mode()
def measure(model, inputs: dict, options: argparse.Namespace, **settings) -> dict[str, float]:
    """Return seconds to the first token, and tokens a second of the steps after it."""
    # The second call repeats the first one and goes on: their difference is what the further steps take.
    times = []
    for count in (1, options.new_tokens):
        seconds = common.stopwatch(options)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, **settings)
        times.append(seconds())
        if output.shape[1] != inputs["input_ids"].shape[1] + count:
            raise ValueError(f"{output.shape[1] - inputs['input_ids'].shape[1]} tokens were generated, not {count}")
    steps = (options.new_tokens - 1) * len(output)
    return {"time to first token": times[0], "decoding": steps / max(times[1] - times[0], 1e-9)}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--compile", action="store_true", help="let a static cache's step be compiled, on the CPU too")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.new_tokens, options.batch_sizes = 4, [2]
    ours, processor = common.random_model(options.shape, projector_bias=False)
    twin, twin_processor = common.idefics3_twin(ours, processor)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    twin, ours = twin.to(options.device, dtype), ours.to(options.device, dtype)
    static = {"cache_implementation": "static", "disable_compile": not options.compile}
    print(common.environment(options) + "\n")
    tables = {}
    for batch_size in options.batch_sizes:
        their_inputs = prepared(twin, twin_processor, batch_size, options, nested=True)
        our_inputs = prepared(ours, processor, batch_size, options, nested=False)
        variants = {
            "Idefics3": partial(measure, twin, their_inputs, options),
            "SiQ-VL": partial(measure, ours, our_inputs, options),
            "Idefics3, static cache": partial(measure, twin, their_inputs, options, **static),
            "SiQ-VL, static cache": partial(measure, ours, our_inputs, options, **static),
        }
        measured = common.interleaved(variants, options.repetitions)
        rows = f"batch of {batch_size}, {our_inputs['input_ids'].shape[1]} tokens of prompt"
        first = common.ratio_table(measured, "time to first token", "s", lower_is_better=True)
        decoding = common.ratio_table(measured, "decoding", "tokens/s")
        tables |= {f"first token, {rows}": first, f"decoding, {rows}": decoding}
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    common.keep(options, tables)


if __name__ == "__main__":
    main()
