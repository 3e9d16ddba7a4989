"""
Computes the vision features of a recipe's pictures ahead of its training run.

    python -m siq_vl.training.store_features --stage 2 --recipe siq-vl-0.5b

It takes what `train_sft.py` takes, and leaves the features in `feature_cache_dir`, where the run finds them. Ended at
any time, it goes on where it was when the same command is given again. A store that is no longer needed is a folder to
remove; its `about.json` says what it belongs to.
"""

from siq_vl import cli
from siq_vl.training.recipes import parse_recipe


def main() -> None:
    """Run the command."""
    recipe = parse_recipe(("1", "2"), description=__doc__)
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    from siq_vl.training.run import hold_out, mixture_for_stage
    from siq_vl.training.starting_model import load_for_stage
    from siq_vl.training.stored_features import rows_with_features

    recipe.features.feature_cache = "on"
    model, processor = load_for_stage(recipe)
    mixture = mixture_for_stage(recipe, recipe.task, processor)
    rows, _ = hold_out(recipe, mixture, recipe.task)
    rows_with_features(recipe, model, processor, rows)


if __name__ == "__main__":
    cli.run(main)
