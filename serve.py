"""
Serve a checkpoint with an OpenAI-style API: `transformers serve` of transformers 5, told about SiQ-VL.

    python serve.py outputs/tiny/stage3 --port 8000
    python serve.py outputs/tiny/stage3 --port 8000 --max_thinking_tokens 64

What follows the checkpoint goes to `transformers serve`. Clients name the checkpoint as it is given here:

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs/tiny/stage3", messages=[...])
"""

import argparse
import logging
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from siq_vl import cli
from siq_vl.configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig

ARCHITECTURE = "SiQVLForConditionalGeneration"


def register(max_thinking_tokens: int | None = None) -> None:
    """Let `transformers serve` find SiQ-VL.

    It looks for the architecture among its own classes, and in its own table for whether that takes images. The auto
    class in its place loads the checkpoint with the code that travels in it.

    Args:
        max_thinking_tokens: bound on the reasoning of every answer; none by default.
    """

    class Served(transformers.AutoModelForImageTextToText):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model = transformers.AutoModelForImageTextToText.from_pretrained(*args, **kwargs)
            if max_thinking_tokens is not None:
                model.generation_config.max_thinking_tokens = max_thinking_tokens
            return model

    setattr(transformers, ARCHITECTURE, Served)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[SiQVLConfig.model_type] = ARCHITECTURE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a checkpoint's folder or Hub id; the repo itself is one")
    parser.add_argument("--max_thinking_tokens", type=int, help="most tokens of the reasoning; the answer follows")
    options, rest = parser.parse_known_args()
    if TRANSFORMERS_4:
        raise ValueError(
            f"transformers is {transformers.__version__}, but only transformers 5 can serve pictures: run this in an "
            "environment with requirements-v5.txt (`make test-v5` makes one in .venv5)"
        )
    if not (Path(options.model) / "config.json").exists() and options.model.count("/") != 1:
        raise ValueError(f"{options.model} holds no checkpoint (no config.json): train it first, or pass another path")
    from transformers.cli.transformers import app

    register(options.max_thinking_tokens)
    logging.getLogger(__name__).info("serving %s", options.model)
    app(["serve", options.model, "--trust-remote-code", *rest])


if __name__ == "__main__":
    cli.run(main)
