"""
What the report's whole run takes: rows, passes, tokens, disk and hours of each stage, predicted, without a download.

    python -m siq_vl.planning.real_run
    python -m siq_vl.planning.real_run --tflops 989 --bandwidth 3350 --utilisation 0.4     # another card
    python -m siq_vl.planning.real_run --results docs/results/real_run.json

Steps, batches and sources are those of the recipes; rows and GB those of `siq_vl/terms.yaml`. Tokens of a row's text, the
share of traces that verification keeps, and the card's utilisation are assumptions: each is an option or stands in a table
of this file. Nothing here was measured on a card.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from siq_vl import cli
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.evaluation.tables import markdown
from siq_vl.planning.sizes import Sizes, count
from siq_vl.results import write_results
from siq_vl.terms import ids_table, terms_of
from siq_vl.training.backbones import planned_config
from siq_vl.training.checkpoints import samples_a_step
from siq_vl.training.recipes import Recipe, parse_recipe

RECIPES = ("siq-vl-0.5b", "siq-vl-1.5b")
# What each stage of stage 3 is called in the report, by its configuration.
CONFIGURATIONS = {"": "3, union", "internvl-chartqa": "3, A.4", "qwen3vl-cocoqa": "3, A.5", "hunyuanocr": "3, A.6"}
# Tokens of a row's text, assumed: questions and answers, or a question with its rationale and answer.
TEXT_TOKENS = {
    "HuggingFaceM4/FineVision/sharegpt4v(knowledge)": 250,
    "HuggingFaceM4/FineVision/LLaVA_Instruct_150K": 300,
    "derek-thomas/ScienceQA": 120,
    "lmms-lab/textvqa": 40,
}
TRACE_TOKENS = 450
CAPTION_TOKENS = 150  # in place of a picture, for the student that reads text alone
# Of a teacher: parameters in billions, tokens that a picture takes at most or is likely to, tokens of a reply.
TEACHERS = {
    "OpenGVLab/InternVL3_5-2B-HF": (2.3, 256 * 13, 400),  # 12 crops and a thumbnail, its default
    "Qwen/Qwen3-VL-2B-Instruct": (2.1, 300, 400),
    "tencent/HunyuanOCR": (1.0, 300, 300),
}
_PROMPT_TOKENS = 120
_BATCH = 8  # of a teacher in this process
_RESUMABLE = 2  # a trainer's own checkpoints that are kept


@dataclass(frozen=True)
class Card:
    """A card, and how much of it is assumed to be used.

    Attributes:
        tflops: in bfloat16, dense.
        bandwidth: of its memory, in GB/s.
        utilisation: share of the first that training and reading reach.
    """

    tflops: float
    bandwidth: float
    utilisation: float

    def hours(self, flops: float) -> float:
        """Return the hours that so many floating-point operations take."""
        return flops / (self.tflops * 1e12 * self.utilisation) / 3600


@dataclass(frozen=True)
class StageCost:
    """What one stage takes.

    Attributes:
        recipe: its name.
        stage: what the report calls it.
        rows: different ones.
        draws: rows that the steps take.
        text: tokens of a row's text, assumed.
        image: tokens of a row's pictures.
        download: GB.
        checkpoints: GB.
        hours: on one card.
    """

    recipe: str
    stage: str
    rows: int
    draws: int
    text: float
    image: int
    download: float
    checkpoints: float
    hours: float

    @property
    def tokens(self) -> float:
        """All that the steps read."""
        return self.draws * (self.text + self.image)


def stage_cost(recipe: Recipe, name: str, card: Card) -> StageCost:
    """Return what a stage takes.

    Args:
        recipe: the stage.
        name: what the report calls it.
        card: where it runs.
    """
    config, _ = planned_config(recipe)
    sizes = count(config, recipe.stage, recipe.model)
    batch, training = samples_a_step(recipe), recipe.training
    if recipe.traces is None:
        sources = recipe.data.sources
        draws = training.max_steps * batch
        sizes_of = {source.name: _rows(source) for source in sources}
        rows = sum(sizes_of.values())
        # Without weights every row is as likely as any other.
        text = sum(sizes_of[name] * TEXT_TOKENS[name] for name in sizes_of) / rows
        names = list(sizes_of)
        if recipe.stage == "1":
            names += [recipe.model.vision_tower, recipe.model.language_model]
        download = sum(terms_of(name).gb or 0 for name in names)
    else:
        rows = recipe.data.train_samples or training.max_steps * batch
        draws = training.max_steps * batch if training.max_steps > 0 else int(rows * training.num_train_epochs)
        text, download = TRACE_TOKENS, 0.0
    image = config.image_seq_length
    if recipe.traces is not None and recipe.traces.student == "text":
        text, image = text + CAPTION_TOKENS, 0
    tokens = draws * (text + image)
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    pictures = draws if image else 0
    # Where rows come again, the frozen tower's features are stored, if there is room for them.
    if draws > rows and rows * patches * config.vision_config.hidden_size * 2 <= recipe.features.feature_cache_gb * 1e9:
        pictures = min(pictures, rows)
    # Forward, the gradient's way back through frozen layers, and, with checkpointing, forward once more.
    passes = 3 if training.gradient_checkpointing else 2
    flops = 2 * passes * tokens * (sizes.language_model + sizes.lora)
    flops += (
        2 * pictures * (config.vision_config.image_size // config.vision_config.patch_size) ** 2 * sizes.vision_tower
    )
    checkpoints = _checkpoint_gb(sizes, recipe)
    return StageCost(recipe.name, name, rows, draws, text, image, download, checkpoints, card.hours(flops))


def _rows(source: SourceConfig) -> int:
    rows = (terms_of(source.name).rows or {}).get(source.split)
    if rows is None:
        raise ValueError(
            f"the rows of {source.name}, split {source.split}, are not known: add them to siq_vl/terms.yaml"
        )
    return rows


def _checkpoint_gb(sizes: Sizes, recipe: Recipe) -> float:
    """Return the GB of a stage's checkpoint, and of those that a run goes on from: what trains, and AdamW's two moments."""
    frozen = 2 if recipe.model.dtype == "bfloat16" else 4
    whole = frozen * (sizes.vision_tower + sizes.language_model) + 4 * sizes.projector
    return (whole + _RESUMABLE * 12 * sizes.trainable) / 1e9


def stage_costs(card: Card) -> list[StageCost]:
    """Return what every stage of both sizes takes, in their order."""
    costs = []
    for name in RECIPES:
        for stage in ("1", "2"):
            costs.append(stage_cost(parse_recipe((stage,), ["--recipe", name, "--stage", stage]), stage, card))
        for config, called in CONFIGURATIONS.items():
            costs.append(stage_cost(_stage_3(name, config), called, card))
    return costs


def _stage_3(name: str, config: str) -> Recipe:
    arguments = ["--recipe", name]
    if config:
        arguments += ["--variant", config]
    return parse_recipe(("3",), arguments)


def stage_table(costs: list[StageCost]) -> str:
    """Return the stages as a Markdown table."""
    header = ["recipe", "stage", "rows", "draws", "passes", "tokens a row", "tokens, millions"]
    lines = [[*header, "download, GB", "checkpoints, GB", "hours"]]
    for each in costs:
        lines.append(
            [each.recipe, each.stage, f"{each.rows:,}", f"{each.draws:,}", f"{each.draws / each.rows:.2f}"]
            + [f"{each.text + each.image:.0f}", f"{each.tokens / 1e6:.0f}", f"{each.download:.1f}"]
            + [f"{each.checkpoints:.1f}", f"{each.hours:.1f}"]
        )
    return markdown(lines)


def trace_table(card: Card, kept: float) -> str:
    """Return, by teacher, what its traces take once, and what asking it for every row of every epoch would.

    Args:
        card: where the teacher runs.
        kept: share of its traces that verification keeps, assumed.
    """
    lines = [["asked", "questions", "tokens read, millions", "tokens written, millions", "hours, offline"]]
    lines[0] += ["draws of all runs", "hours, online", "times"]
    for teacher, (billions, picture, reply) in TEACHERS.items():
        needed = draws = 0
        for name in RECIPES:
            for config, called in CONFIGURATIONS.items():
                recipe = _stage_3(name, config)
                if config and teacher in recipe.traces.weights:
                    cost = stage_cost(recipe, called, card)
                    needed, draws = max(needed, cost.rows), draws + cost.draws
        questions = round(needed / kept)
        hours = _teacher_hours(card, billions, picture, reply)
        read, written = questions * (picture + _PROMPT_TOKENS), questions * reply
        lines.append(
            [teacher, f"{questions:,}", f"{read / 1e6:.1f}", f"{written / 1e6:.1f}", f"{questions * hours:.1f}"]
            + [f"{draws:,}", f"{draws * hours:.1f}", f"{draws / questions:.1f}"]
        )
    return markdown(lines)


def _teacher_hours(card: Card, billions: float, picture: int, reply: int) -> float:
    """Return the hours of one reply: reading takes operations, writing reads all weights once a token for a batch."""
    reading = card.hours(2 * billions * 1e9 * (picture + _PROMPT_TOKENS))
    writing = reply * 2 * billions / card.bandwidth / _BATCH / 3600
    return reading + writing


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tflops", type=float, default=165, help="of the card, dense bfloat16; an RTX 4090's by default"
    )
    parser.add_argument("--bandwidth", type=float, default=1008, help="of its memory, GB/s")
    parser.add_argument("--utilisation", type=float, default=0.3, help="of the first, assumed")
    parser.add_argument("--kept", type=float, default=0.6, help="share of traces that verification keeps, assumed")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the tables in this file, too")
    options = parser.parse_args()
    for name in ("tflops", "bandwidth"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be above 0")
    for name in ("utilisation", "kept"):
        if not 0 < getattr(options, name) <= 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be above 0, and at most 1")
    return options


def main() -> None:
    """Run the command."""
    options = parse_options()
    card = Card(options.tflops, options.bandwidth, options.utilisation)
    costs = stage_costs(card)
    tables = {"stages": stage_table(costs), "traces": trace_table(card, options.kept), "ids": ids_table()}
    cli.say(
        f"PREDICTED, for {card.tflops:g} TFLOPS used at {card.utilisation:.0%} and {card.bandwidth:g} GB/s; nothing of it "
        f"was measured.\n\n{tables['stages']}\n\n{tables['traces']}"
    )
    if options.results:
        figures = {"hours of all stages": round(sum(each.hours for each in costs), 1)}
        write_results(options.results, tables, figures)


if __name__ == "__main__":
    cli.run(main)
