"""
Stages 1 and 2: projector alignment and instruction tuning.

    accelerate launch train_sft.py --stage 1
    accelerate launch train_sft.py --stage 2 --learning_rate 1e-3 --output_dir outputs/mine

`--recipe` picks a folder of `recipes/` (default: tiny); any field of its YAML can be overridden on the command line.
Stage 2 starts from the checkpoint that stage 1 of the same recipe left.
"""

from siq_vl import cli
from siq_vl.training.loading import load_for_stage
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, mixture_for_stage, train_and_save

TASKS = {"1": "caption", "2": "answer"}


def main() -> None:
    recipe = parse_recipe(tuple(TASKS), description=__doc__)
    model, processor = load_for_stage(recipe)
    mixture = mixture_for_stage(recipe, TASKS[recipe.stage], processor)
    trainer = make_trainer(recipe, model, processor, mixture.rows)
    train_and_save(trainer, processor, recipe, mixture.report)


if __name__ == "__main__":
    cli.run(main)
