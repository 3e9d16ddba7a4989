"""
Stage 3: offline chain-of-thought distillation, on traces `<think>rationale</think><answer>answer</answer>`.

    accelerate launch train_distill.py
    accelerate launch train_distill.py --recipe tiny --direct_share 0

It starts from the checkpoint that stage 2 of the same recipe left. The traces of recipe `tiny` are those of the drawn
data set's scripted oracle.
"""

from siq_vl import cli
from siq_vl.data.figures.rows import training_rows
from siq_vl.training.loading import load_for_stage
from siq_vl.training.plan import plan
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, rows_needed, train_and_save


def main() -> None:
    recipe = parse_recipe(("3",), description=__doc__)
    if recipe.run.dry_run:
        cli.say(plan(recipe, "reason"), recipe.training.process_index)
        return
    model, processor = load_for_stage(recipe)
    data = recipe.data
    rows = training_rows(
        "train",
        rows_needed(recipe),
        "reason",
        seed=data.data_seed_offset,
        style=data.rationale_style,
        direct_share=data.direct_share,
        blind=data.blind,
    )
    trainer = make_trainer(recipe, model, processor, rows)
    train_and_save(trainer, processor, recipe)


if __name__ == "__main__":
    cli.run(main)
