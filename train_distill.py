"""
Stage 3: offline chain-of-thought distillation, on traces `<think>rationale</think><answer>answer</answer>`.

    python generate_traces.py --teacher figures --style structured --count 14720 --output outputs/tiny/traces
    accelerate launch train_distill.py
    accelerate launch train_distill.py --teachers figures-structured=2 figures-terse --curriculum length
    python train_distill.py --emergence_steps 50           # how reasoning emerges: emergence.jsonl, emergence.svg
    python train_distill.py --recipe siq-vl-0.5b --variant internvl_chartqa --dry_run

It starts from the checkpoint that stage 2 of the same recipe left, and learns from the store of traces that the recipe
names. `--variant` picks one of several files of the stage, `recipes/<recipe>/stage3-<variant>.yaml`; `--config` is a YAML
file of fields, as in TRL's scripts.
"""

from siq_vl import cli
from siq_vl.locks import Lock
from siq_vl.training.recipes import parse_recipe


def main() -> None:
    recipe = parse_recipe(("3",), description=__doc__)
    # Imported once the options are known: torch and transformers take seconds, and `--help` needs none of them.
    from siq_vl.planning.plan import plan
    from siq_vl.training.emergence import watched_rows
    from siq_vl.training.run import held_out_traces, make_trainer, traces_for_stage, train_and_save
    from siq_vl.training.starting_model import load_for_stage

    if recipe.run.dry_run:
        cli.say(plan(recipe, recipe.task), recipe.training.process_index)
        return
    with Lock(recipe.training.output_dir, held=recipe.training.process_index == 0):
        model, processor = load_for_stage(recipe)
        traces = traces_for_stage(recipe, processor)
        held_out, watched = held_out_traces(recipe, traces), watched_rows(recipe, traces)
        trainer = make_trainer(recipe, model, processor, traces.rows, held_out, traces.validation, watched)
        train_and_save(trainer, processor, recipe, traces.report)


if __name__ == "__main__":
    cli.run(main)
