"""
Write a checkpoint as a page with no server: a static folder in which a browser runs the model.

    python export_web.py outputs/tiny/stage3 outputs/web
    python -m http.server --directory outputs/web

Needs requirements-export.txt, and `npm ci --ignore-scripts` in web/. `make web` does all of it for the checkpoint that the
repo is. The folder is a static Space as it is.
"""

import argparse
import tempfile
from pathlib import Path

from siq_vl import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or Hub id")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--kind", default="fp32", help="what the page's weights are held in: fp32, fp16, int8 or q4")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="bound on reasoning and answer together")
    parser.add_argument("--exported", type=Path, help="what export_onnx.py --attention wrote; by default it is made")
    options = parser.parse_args()
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    try:
        from siq_vl.export.onnx_sessions import export_onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error
    import torch

    from siq_vl.export.web_page import build_page
    from siq_vl.loading import load_checkpoint

    model, processor = load_checkpoint(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        exported = options.exported
        if exported is None:
            exported = Path(scratch)
            export_onnx(model.to("cpu", torch.float32), processor, exported, [options.kind], attention=True)
        build_page(model.config, processor, exported, options.output, options.kind, options.max_new_tokens)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"{options.output}  {size / 2**20:.1f} MiB; serve it: python -m http.server --directory {options.output}")


if __name__ == "__main__":
    cli.run(main)
