"""
How fast the loader makes batches: pictures decoded and prepared for the tower, or their stored features read.

    python benchmarks/loader.py
    python benchmarks/loader.py --workers 0 2 4

The baseline decodes JPEGs of 640 x 480 in the training process. Loader processes hide that behind the training step as
long as they are faster than it; stored features save it.
"""

import tempfile
from pathlib import Path

import common
from torch.utils.data import DataLoader

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.feature_cache.build import cached_rows
from siq_vl.data.mixture_config import FeatureArguments, MixtureConfig, SourceConfig
from siq_vl.data.mixtures import build_mixture


def once(rows, collate, workers: int, options) -> common.Figures:
    """Return the samples a second of one pass, processes started and ended in it."""
    loader = DataLoader(
        rows, batch_size=options.batch_size, collate_fn=collate, num_workers=workers, prefetch_factor=4 if workers else None
    )  # fmt: skip
    seconds = common.stopwatch(options)
    count = sum(len(batch["input_ids"]) for batch in loader)
    return {"loading": count / seconds()}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    options = common.prepare(parser.parse_args())
    if options.quick:
        options.rows, options.workers = 8, [0]
    model, processor = common.random_model(options.shape)
    with tempfile.TemporaryDirectory() as folder:
        path = common.write_rows(Path(folder), options.rows, long_share=0.25)
        config = MixtureConfig(sources=[SourceConfig(str(path))])
        rows = build_mixture(config, "answer", None, processor=processor).rows
        settings = FeatureArguments(feature_cache="on", feature_cache_dir=f"{folder}/features")
        stored = cached_rows(rows, model, processor, settings, bf16=False, device=options.device)
        collate = ConversationCollator(processor)
        variants = {}
        for workers in options.workers:
            for name, source in (("pictures decoded", rows), ("stored features", stored)):
                variants[f"{name}, {workers} processes"] = lambda source=source, workers=workers: once(
                    source, collate, workers, options
                )
        measured = common.interleaved(variants, options.repetitions)
    print(common.environment(options) + "\n")
    common.show(options, {"loading": common.ratio_table(measured, "loading", "samples/s")})


if __name__ == "__main__":
    main()
