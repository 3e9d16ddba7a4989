"""
Ask a checkpoint about a picture.

    python ask.py picture.png "What color is the fish?"
    python ask.py picture.png "How much are Jan and May together?" --model outputs/tiny/stage3 --no_thinking
    python ask.py picture.png "How much are Jan and May together?" --max_thinking_tokens 16

Prints the reasoning and the answer. Without `--model` the checkpoint is the repo itself.
"""

import argparse
from pathlib import Path
from typing import Any

from siq_vl import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="a picture in any format that Pillow reads")
    parser.add_argument("question")
    parser.add_argument("--model", default=str(Path(__file__).parent), help="a checkpoint's folder or Hub id")
    parser.add_argument("--no_thinking", action="store_true", help="answer at once, without reasoning")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--max_thinking_tokens", type=int, help="most tokens of the reasoning; the answer follows")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="hold the language model in NF4 or int8")
    options = parser.parse_args()
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    from siq_vl.data.figures.rows import user_turn
    from siq_vl.data.images import open_image
    from siq_vl.evaluation.generation import generate_texts
    from siq_vl.loading import load_checkpoint
    from siq_vl.parsing.answers import parse

    # Picture and question are looked at first: loading a model takes longer than reading a refusal.
    image = open_image(options.image)
    if not options.question.strip():
        raise ValueError("the question is empty: ask something about the picture")
    model, processor = load_checkpoint(options.model, options.bits)
    template_options: dict[str, Any] = {}
    if options.no_thinking:
        template_options["enable_thinking"] = False
    (text,) = generate_texts(
        model,
        processor,
        [user_turn(options.question)],
        [[image]],
        max_new_tokens=options.max_new_tokens,
        max_thinking_tokens=options.max_thinking_tokens,
        **template_options,
    )
    parsed = parse(text)
    if parsed.rationale:
        print(f"reasoning: {parsed.rationale}")
    print(f"answer: {parsed.answer or '(none within max_new_tokens)'}")


if __name__ == "__main__":
    cli.run(main)
