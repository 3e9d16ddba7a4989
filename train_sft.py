"""
Stages 1 and 2: projector alignment and instruction tuning.

    accelerate launch train_sft.py --stage 1
    accelerate launch train_sft.py --stage 2 --learning_rate 1e-3 --output_dir outputs/mine
    python train_sft.py --stage 2 --recipe siq-vl-0.5b --dry_run

`--recipe` picks a folder of `recipes/` (default: tiny) or any other folder, `--config` a YAML file, as in TRL's scripts;
any field of these can be overridden on the command line. Stage 2 starts from the checkpoint that stage 1 of the same
recipe left. A run that was ended goes on where it was when the same command is given again. `--dry_run` prints the plan
and stops.
"""

from siq_vl import cli
from siq_vl.locks import Lock
from siq_vl.training.recipes import parse_recipe


def main() -> None:
    recipe = parse_recipe(("1", "2"), description=__doc__)
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    from siq_vl.planning.plan import plan
    from siq_vl.training.run import hold_out, make_trainer, mixture_for_stage, train_and_save
    from siq_vl.training.starting_model import load_for_stage

    if recipe.run.dry_run:
        cli.say(plan(recipe, recipe.task), recipe.training.process_index)
        return
    with Lock(recipe.training.output_dir, held=recipe.training.process_index == 0):
        model, processor = load_for_stage(recipe)
        mixture = mixture_for_stage(recipe, recipe.task, processor)
        rows, held_out = hold_out(recipe, mixture, recipe.task)
        trainer = make_trainer(recipe, model, processor, rows, held_out)
        train_and_save(trainer, processor, recipe, mixture.report)


if __name__ == "__main__":
    cli.run(main)
