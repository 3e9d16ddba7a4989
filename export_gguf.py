"""
Write a checkpoint as GGUF files for llama.cpp: the language model, the picture side (mmproj), and a Modelfile for Ollama.

    python export_gguf.py outputs/tiny/stage3 outputs/gguf
    python export_gguf.py outputs/tiny/stage3 outputs/gguf --kinds q8_0 q4_k

Needs requirements-export.txt. llama.cpp computes the same for square pictures; give it those of the tower's own size, and the
numbers of image tokens that this command prints. What it computes otherwise is refused.
"""

import argparse
from pathlib import Path

from siq_vl import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or Hub id")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--kinds", nargs="+", default=["f32", "f16", "q8_0", "q4_k"], help="what weights are held in")
    options = parser.parse_args()
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    try:
        from siq_vl.export.gguf_files import export_gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error
    import torch

    from siq_vl.loading import load_checkpoint

    if options.output.is_dir() and any(options.output.iterdir()):
        raise ValueError(f"{options.output} is not empty: pass a new folder")
    model, processor = load_checkpoint(options.model)
    export_gguf(model.to("cpu", torch.float32), processor, options.output, options.kinds)
    for file in sorted(options.output.iterdir()):
        print(f"{file}  {file.stat().st_size / 2**20:.1f} MiB")
    side, tokens = model.config.vision_config.image_size, processor.image_seq_length
    print(f"pictures: {side} x {side} pixels, --image-min-tokens {tokens} --image-max-tokens {tokens}")


if __name__ == "__main__":
    cli.run(main)
