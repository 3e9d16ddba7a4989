"""
Write a checkpoint as ONNX sessions, for onnxruntime and transformers.js: in Python, Node and browsers.

    python export_onnx.py outputs/tiny/stage3 outputs/onnx
    python export_onnx.py outputs/tiny/stage3 outputs/onnx --kinds fp32 int8

Needs requirements-export.txt. The sessions take pictures, sequences and caches of any size. `int8`, `fp16` and `q4` are
computed from the fp32 sessions, which are always written.
"""

import argparse
from pathlib import Path

from siq_vl import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or Hub id")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--kinds", nargs="+", default=["fp32", "fp16", "int8", "q4"], help="what weights are held in")
    parser.add_argument("--attention", action="store_true", help="let the decoder return where the tokens looked")
    options = parser.parse_args()
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    try:
        from siq_vl.export.onnx_sessions import export_onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error
    import torch

    from siq_vl.loading import load_checkpoint

    if options.output.is_dir() and any(options.output.iterdir()):
        raise ValueError(f"{options.output} is not empty: pass a new folder")
    model, processor = load_checkpoint(options.model)
    export_onnx(model.to("cpu", torch.float32), processor, options.output, options.kinds, options.attention)
    for session in sorted((options.output / "onnx").iterdir()):
        print(f"{session}  {session.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
