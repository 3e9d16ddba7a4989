"""
Evaluate checkpoints on held-out drawn figures.

    python evaluate_vqa.py --model stage3=outputs/tiny/stage3
    python evaluate_vqa.py --model stage2=outputs/tiny/stage2 --model blind=outputs/tiny/blind --blind blind
    python evaluate_vqa.py --captions stage1 --model stage1=outputs/tiny/stage1

Each model's answers are written to `<output>/<name>.jsonl`, and one table of accuracies with 95% intervals is printed.
"""

import argparse
import json
from pathlib import Path

from siq_vl import cli
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.figures import held_out_items
from siq_vl.evaluation.tables import accuracy_table, caption_table
from siq_vl.loading import load_checkpoint


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=CHECKPOINT", help="repeat for several")
    parser.add_argument(
        "--blind", action="append", default=[], metavar="NAME", help="withhold the pictures from this model"
    )
    parser.add_argument(
        "--captions", action="append", default=[], metavar="NAME", help="also score this model's captions"
    )
    parser.add_argument(
        "--count", type=int, default=900, help="ordinary questions; a fifth as many of each other group"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"), help="folder of the answers")
    options = parser.parse_args()
    for given in options.model:
        if "=" not in given:
            raise ValueError(
                f"--model is {given!r}; write it as NAME=CHECKPOINT, for instance stage3=outputs/tiny/stage3"
            )
    options.model = dict(given.split("=", 1) for given in options.model)
    for name in (*options.blind, *options.captions):
        if name not in options.model:
            raise ValueError(
                f"{name!r} is none of the models {', '.join(options.model)}: pass it as --model {name}=CHECKPOINT"
            )
    if options.count < 5:
        raise ValueError(f"--count is {options.count}; it must be at least 5")
    return options


def main() -> None:
    options = parse_options()
    items = held_out_items(options.count)
    answers = {}
    for name, checkpoint in options.model.items():
        model, processor = load_checkpoint(checkpoint)
        answers[name] = kept.predict(model, processor, items, blind=name in options.blind, progress=name)
        kept.write(answers[name], options.output / f"{name}.jsonl")
        if name in options.captions:
            pictures = [item for item in items if item.group == "held out"][: options.count // 3]
            scores = kept.caption_scores(model, processor, pictures, progress=f"{name} captions")
            (options.output / f"{name}.captions.json").write_text(
                json.dumps({"count": len(pictures), "scores": scores})
            )
            print(f"\n{name}\n\n{caption_table(scores, len(pictures))}")
    print(f"\n{accuracy_table(answers)}")


if __name__ == "__main__":
    cli.run(main)
