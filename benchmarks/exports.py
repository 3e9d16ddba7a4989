"""
What exporting a model of the recipe siq-vl-0.5b costs: time, peak memory and size, with random weights.

    python benchmarks/exports.py

Each export runs in a process of its own, whose largest resident memory is measured; the model itself is a part of it. The
random weights are of the real shapes, so all but the tokenizer is as large as in a trained checkpoint. Needs
requirements-export.txt, and about 20 GB of disk.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.configuration_siq_vl import SiQVLConfig  # noqa: E402
from siq_vl.evaluation.tables import markdown  # noqa: E402
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration  # noqa: E402
from siq_vl.processing_siq_vl import SiQVLProcessor  # noqa: E402
from siq_vl.results import write_results  # noqa: E402

# What is exported, each in one go, and the smaller kind whose size is shown beside the larger one's.
EXPORTS = (("GGUF", ("f16", "q4_k")), ("ONNX", ("fp32", "q4")))


def random_model() -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
    """Return a model of the report's shapes, with random weights, and a processor of its picture size."""
    processor = SiQVLProcessor.from_pretrained(REPO_ROOT)
    token_id = processor.tokenizer.convert_tokens_to_ids
    names = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    names["vision_end_token_id"] = "<|vision_end|>"
    config = SiQVLConfig(**{name: token_id(token) for name, token in names.items()})
    config.vision_config.hidden_act = "gelu_pytorch_tanh"
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    vision = config.vision_config
    processor.image_processor.size = {"height": vision.image_size, "width": vision.image_size}
    processor.patch_size = vision.patch_size
    torch.manual_seed(0)
    return SiQVLForConditionalGeneration(config).eval(), processor


def export(name: str, kinds: Sequence[str], folder: Path) -> dict:
    """Export in this process; return seconds, peak memory in GiB and, by kind, the size of what an engine reads in MiB."""
    model, processor = random_model()
    begin = time.perf_counter()
    files = {}
    if name == "ONNX":
        from siq_vl.export.onnx_sessions import SESSIONS, SUFFIXES, export_onnx

        export_onnx(model, processor, folder, kinds)
        for kind in kinds:
            wanted = [f"{session}{SUFFIXES[kind]}.onnx" for session in SESSIONS]
            files[kind] = [path for path in (folder / "onnx").iterdir() if path.name.removesuffix("_data") in wanted]
    else:
        from siq_vl.export.gguf_files import export_gguf

        export_gguf(model, processor, folder, kinds)
        for kind in kinds:
            files[kind] = [folder / f"model-{kind}.gguf", folder / "mmproj-f16.gguf"]
    seconds = time.perf_counter() - begin
    sizes = {kind: sum(file.stat().st_size for file in read) / 2**20 for kind, read in files.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak": peak, "sizes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("FORMAT", "FOLDER"), help="one export, in this process")
    parser.add_argument("--formats", nargs="+", default=list(dict(EXPORTS)), choices=list(dict(EXPORTS)))
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the table in this file, too")
    options = parser.parse_args()
    if options.only:
        name, folder = options.only
        print(json.dumps(export(name, dict(EXPORTS)[name], Path(folder))))
        return
    lines = [["export", "weights", "MiB", "minutes", "peak memory, GiB"]]
    for name in options.formats:
        kinds = dict(EXPORTS)[name]
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "--only", name, str(Path(scratch) / "made")]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            made = json.loads(printed.splitlines()[-1])
        sizes = " and ".join(f"{made['sizes'][kind]:.0f}" for kind in kinds)
        lines.append([name, " and ".join(kinds), sizes, f"{made['seconds'] / 60:.1f}", f"{made['peak']:.1f}"])
        print(lines[-1], flush=True)
    table = markdown(lines)
    print(table)
    if options.results is not None:
        write_results(options.results, {"exports": table})


if __name__ == "__main__":
    main()
