"""
A page to talk to checkpoints about pictures.

    python app.py
    python app.py --model outputs/tiny/stage3
    python app.py --model "stage 2=outputs/tiny/stage2" --model "stage 3=outputs/tiny/stage3"

The reasoning streams, the answer stands apart, and each part of both shows where in the picture the model looked while it
wrote it. Several checkpoints answer side by side. Without `--model` the checkpoint is the repo itself.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from siq_vl import cli


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="[NAME=]CHECKPOINT", help="repeat to compare several")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="bound on reasoning and answer together")
    parser.add_argument("--at_once", type=int, default=2, help="answers of one checkpoint under way at the same time")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    options = parser.parse_args()
    for name in ("max_new_tokens", "at_once"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    options.model = checkpoints(options.model or [f"SiQ-VL={Path(__file__).resolve().parent}"])
    return options


def checkpoints(given: list[str]) -> Mapping[str, str]:
    """Return checkpoints by name; one without a name is called like its folder.

    Raises:
        ValueError: a name or a checkpoint is empty, or two have the same name.
    """
    by_name: dict[str, str] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign:
            name, path = Path(text).name, text
        if not name.strip() or not path:
            raise ValueError(
                f"--model is {text!r}; write it as NAME=CHECKPOINT, for instance stage3=outputs/tiny/stage3"
            )
        if name in by_name:
            raise ValueError(f"--model names {name} twice; give each checkpoint a name of its own")
        by_name[name] = path
    return by_name


def main() -> None:
    options = parse_options()
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    from siq_vl.loading import load_checkpoint
    from siq_vl.page.layout import build_page, launch_options
    from siq_vl.page.streaming import StreamingModel

    models = []
    for name, path in options.model.items():
        model, processor = load_checkpoint(path)
        models.append(StreamingModel(name, model, processor, options.max_new_tokens))
    page = build_page(models, options.at_once)
    page.launch(server_port=options.port, **launch_options())


if __name__ == "__main__":
    cli.run(main)
