"""
What a training step costs as rows grow longer, hold more pictures, and as the data set grows.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --shape 0.5b --device cuda --lengths 1024 2048 4096

Seconds and peak memory of a LoRA step by length and by pictures a row, relative to the first; then the resident memory
of this process while the loader reads data sets of growing size, which has to stay flat.
"""

import copy
import logging
from functools import partial
from itertools import islice

import common
import memory
import psutil
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.figures.rows import training_rows
from siq_vl.planning.sizes import MIB


def step_batch(config, length: int, images: int) -> dict[str, torch.Tensor]:
    """Return a batch of one row with pictures and 64 supervised tokens."""
    n_tokens = config.image_seq_length
    ids = torch.full((1, length), 9)
    ids[:, : images * n_tokens] = config.image_token_id
    labels = ids.clone()
    labels[:, : -min(64, length - images * n_tokens)] = -100
    side = config.vision_config.image_size
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.rand(images, 3, side, side)}


def one_step(model: PreTrainedModel, batch: dict[str, torch.Tensor], options) -> common.Figures:
    """Return the seconds of a forward and a backward pass, and the most memory they hold beyond the weights."""
    batch = {name: value.to(options.device) for name, value in batch.items()}

    def work() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    # Timed and then measured again, since watching memory takes time.
    seconds = common.stopwatch(options)
    work()
    taken = seconds()
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return {"step": taken, "memory": (torch.cuda.max_memory_allocated() - before) / MIB}
    return {"step": taken, "memory": memory.peak_on_cpu(work) / MIB}


def resident_by_size(options, processor) -> list[tuple[int, float]]:
    """Return (rows of the data set, MiB of this process after 200 of its rows), each in the same process."""
    collate = ConversationCollator(processor)
    n_batches = 2 if options.quick else 25
    seen = []
    for size in options.data_sizes:
        rows = training_rows("train", size, "answer")
        # In random order, as training reads them: so all of the data set is reached for.
        loader = DataLoader(rows, batch_size=8, collate_fn=collate, shuffle=True)
        for _ in islice(loader, n_batches):
            pass
        seen.append((size, psutil.Process().memory_info().rss / MIB))
    return seen


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--data_sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.lengths, options.images, options.data_sizes = [64, 128], [1, 2], [100, 1000]
    logging.disable(logging.WARNING)
    model, processor = common.random_model(options.shape)
    model = copy.deepcopy(model).to(options.device).requires_grad_(False).train()
    model.model.projector.requires_grad_(True)
    print(common.environment(options))
    tables = {}
    # The rows of the second sweep are all as long: what differs is the share of them that is pictures.
    longest = max(options.images) * model.config.image_seq_length + 128
    by_length, by_images = {}, {}
    for length in options.lengths:
        by_length[str(length)] = step_batch(model.config, length, 1)
    for images in options.images:
        by_images[str(images)] = step_batch(model.config, longest, images)
    for title, batches in (("tokens a row", by_length), (f"pictures in {longest} tokens", by_images)):
        variants = {}
        for name, batch in batches.items():
            variants[name] = partial(one_step, model, batch, options)
        measured = common.interleaved(variants, options.repetitions)
        print(f"\n{title}; a ratio of 0.5 is twice the cost\n")
        for figure, unit in (("step", "s"), ("memory", "MiB")):
            tables[f"{title}, {figure}"] = common.ratio_table(measured, figure, unit, lower_is_better=True)
            print(tables[f"{title}, {figure}"] + "\n")
    resident = [[f"{size:,}", f"{mib:.0f}"] for size, mib in resident_by_size(options, processor)]
    tables["data"] = common.table(["rows of the data set", "MiB resident"], resident)
    print(tables["data"])
    common.keep(options, tables)


if __name__ == "__main__":
    main()
