"""
Serve a checkpoint with an OpenAI-style API: `transformers serve` of transformers 5, told about SiQ-VL.

    python serve.py outputs/tiny/stage3 --port 8000
    python serve.py outputs/tiny/stage3 --port 8000 --max_thinking_tokens 64

What follows the checkpoint goes to `transformers serve`, but a request gets there only once it is checked: see
`siq_vl/serving.py`. Pictures come in the request, as `data:` addresses, and from elsewhere only where
`--allow_local_images FOLDER` or `--allow_remote_images` says so. Clients name the checkpoint as it is given here:

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs/tiny/stage3", messages=[...])
"""

import argparse
import logging
import sys
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from siq_vl import cli
from siq_vl.configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig
from siq_vl.serving import Allowed, Guard, RequestCheck

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

    # Not the name above: transformers 5 puts another module in its place while its parts are imported.
    setattr(sys.modules["transformers"], ARCHITECTURE, Served)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[SiQVLConfig.model_type] = ARCHITECTURE


def guard(allowed: Allowed) -> None:
    """Let `transformers serve` build its server with the check of requests inside it."""
    from starlette.middleware import Middleware
    from transformers.cli.serving import server

    build = server.build_server

    def build_guarded(model_manager, *arguments, **options):
        served = build(model_manager, *arguments, **options)
        # The name that the manager keeps the one served model under.
        name = model_manager.process_model_name(model_manager.force_model)
        model, processor = model_manager.load_model_and_processor(name)
        generate = model.generate
        # It hands the processor on as the tokenizer, which stop sequences need the vocabulary of.
        model.generate = lambda **inputs: generate(**{**inputs, "tokenizer": processor.tokenizer})
        check = RequestCheck(model, processor, allowed)
        served.user_middleware.append(Middleware(Guard, check=check))  # the last: refusals get CORS headers as well
        return served

    server.build_server = build_guarded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a checkpoint's folder or Hub id; the repo itself is one")
    parser.add_argument("--max_thinking_tokens", type=int, help="most tokens of the reasoning; the answer follows")
    parser.add_argument("--allow_local_images", type=Path, metavar="FOLDER", help="clients may name pictures below it")
    parser.add_argument("--allow_remote_images", action="store_true", help="clients may name public web addresses")
    options, rest = parser.parse_known_args()
    if TRANSFORMERS_4:
        raise ValueError(
            f"transformers is {transformers.__version__}, but only transformers 5 can serve pictures: run this in an "
            "environment with requirements-v5.txt (`make test-v5` makes one in .venv5)"
        )
    if not (Path(options.model) / "config.json").exists() and options.model.count("/") != 1:
        raise ValueError(f"{options.model} holds no checkpoint (no config.json): train it first, or pass another path")
    if options.allow_local_images is not None and not options.allow_local_images.is_dir():
        raise ValueError(f"--allow_local_images is {options.allow_local_images}; it must be a folder")
    from transformers.cli.transformers import app

    guard(Allowed(options.allow_local_images, options.allow_remote_images))
    register(options.max_thinking_tokens)
    logging.getLogger(__name__).info("serving %s", options.model)
    app(["serve", options.model, "--trust-remote-code", *rest])


if __name__ == "__main__":
    cli.run(main)
