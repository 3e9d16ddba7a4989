"""The plan of an ablation, read from YAML, and the jobs that it takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from zlib import crc32

import yaml

from siq_vl.ablation.jobs import Job

WEIGHTS = "model.safetensors"
START = "start"  # what the arm without training is called among seeds
# Rows of a store, by the rows that a run takes: more than those, so that other seeds draw other questions.
_SPARE_ROWS = 1.2


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        about: what it is, in a line.
        train: the training command; none for the starting checkpoint as it is.
        steps: its optimizer steps, as a multiple of the plan's.
        ways: the ways in which it is asked, of the plan's `evaluate`.
    """

    about: str
    train: str | None = None
    steps: float = 1.0
    ways: tuple[str, ...] = ("answers",)

    @property
    def is_trained(self) -> bool:
        return bool(self.train)


@dataclass(frozen=True)
class Plan:
    """What is trained, asked and compared; the fields are those of the YAML file.

    Args:
        steps: optimizer steps of an arm.
        batch: rows a step, from which the size of the stores follows.
        seeds: runs an arm.
        count: ordinary questions that every run is asked.
        start: checkpoint that every arm starts from.
        prepare: commands that make it, each with what it makes and what it comes after.
        stores: commands that make the traces, by name.
        evaluate: commands that ask, by way; `answers` is the one that every arm is asked in.
        arms: by name.
        compare: pairs of arms, first minus second.
    """

    steps: int
    batch: int
    seeds: int
    count: int
    start: Path
    prepare: dict[str, dict[str, str]]
    stores: dict[str, str]
    evaluate: dict[str, str]
    arms: dict[str, Arm]
    compare: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if "answers" not in self.evaluate:
            raise ValueError("evaluate has no way 'answers': add the command that asks every arm")
        for name, arm in self.arms.items():
            if "answers" not in arm.ways or not set(arm.ways) <= set(self.evaluate):
                raise ValueError(
                    f"arm {name!r} is asked in the ways {', '.join(arm.ways)}; 'answers' must be among them, and all of "
                    f"them among {', '.join(self.evaluate)}"
                )
        for pair in self.compare:
            for name in pair:
                if name not in self.arms:
                    raise ValueError(f"compare names {name!r}, which is none of the arms {', '.join(self.arms)}")

    def only(self, names: Iterable[str]) -> "Plan":
        """Return the plan with these arms alone, and the pairs among them.

        Raises:
            ValueError: there is no such arm.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self.arms:
                raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(self.arms)}")
        arms = {name: arm for name, arm in self.arms.items() if name in wanted}
        pairs = tuple(pair for pair in self.compare if arms.keys() >= set(pair))
        return replace(self, arms=arms, compare=pairs)

    def steps_of(self, name: str) -> int:
        """Return the optimizer steps of a run of an arm; 0 where nothing is trained."""
        arm = self.arms[name]
        if not arm.is_trained:
            return 0
        return round(self.steps * arm.steps)

    def seeds_of(self, name: str) -> list[str]:
        """Return what the runs of an arm are called."""
        if not self.arms[name].is_trained:
            return [START]
        return [f"seed{seed}" for seed in range(1, self.seeds + 1)]

    def checkpoints_of(self, name: str, out: Path) -> dict[str, Path]:
        """Return the folders of an arm's checkpoints, by the names of its runs."""
        if not self.arms[name].is_trained:
            return {START: self.start}
        return {seed: out / name / seed for seed in self.seeds_of(name)}


def read_plan(path: Path, **overrides: int | None) -> Plan:
    """Read a plan.

    Args:
        path: the YAML file.
        overrides: fields that are set otherwise; None leaves one as it is.

    Raises:
        ValueError: there is no such file, or its fields are not those of a plan.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass --plan with a file such as recipes/tiny/ablations.yaml")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in overrides.items():
        if value is not None:
            given[name] = value
    _check_fields(given, Plan, str(path), required=_names(Plan))
    arms = {}
    for name, settings in given["arms"].items():
        _check_fields(settings, Arm, f"arm {name!r}", required=["about"])
        # YAML has lists where the fields are tuples.
        if "ways" in settings:
            settings["ways"] = tuple(settings["ways"])
        arms[name] = Arm(**settings)
    given["arms"] = arms
    given["start"] = Path(given["start"])
    given["compare"] = tuple((first, second) for first, second in given["compare"])
    return Plan(**given)


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _check_fields(given: Mapping, kind: type, where: str, required: Sequence[str]) -> None:
    names = _names(kind)
    for name in given:
        if name not in names:
            raise ValueError(f"{where} has a field {name!r}; the fields are {', '.join(names)}")
    for name in required:
        if name not in given:
            raise ValueError(f"{where} lacks the field {name!r}")


def jobs_of(plan: Plan, out: Path) -> list[Job]:
    """Return the jobs of a plan: what prepares it, then arm by arm its runs and its evaluations."""
    preparing = _preparing(plan)
    ready = tuple(job.name for job in preparing)
    stores = _stores(plan, out)
    of_arms: list[Job] = []
    for name, arm in plan.arms.items():
        # The start is asked as soon as it is there; what is trained, when all its runs are.
        trained = ready
        if arm.is_trained:
            runs = _training(plan, name, out, stores, ready)
            of_arms += runs
            trained = tuple(run.name for run in runs)
        of_arms += _evaluating(plan, name, out, trained)
    # A store that no arm reads need not be made.
    awaited: set[str] = set()
    for job in of_arms:
        awaited.update(job.after)
    needed = [store for store in stores.values() if store.name in awaited]
    return [*preparing, *needed, *of_arms]


def _preparing(plan: Plan) -> list[Job]:
    """Return the jobs that make the checkpoint that every arm starts from."""
    jobs = []
    for name, step in plan.prepare.items():
        after: tuple[str, ...] = ()
        if "after" in step:
            after = (f"prepare/{step['after']}",)
        weights = Path(step["makes"]) / WEIGHTS
        jobs.append(Job(f"prepare/{name}", step["run"], weights, after=after, kind=name, once=True))
    return jobs


def _stores(plan: Plan, out: Path) -> dict[str, Job]:
    """Return by name the jobs that make the traces."""
    rows = int(plan.steps * plan.batch * _SPARE_ROWS)
    jobs = {}
    for name, template in plan.stores.items():
        # Another command makes another folder, so that no store is a mixture.
        folder = out / "stores" / f"{name}-{crc32(template.encode()):08x}"
        command = f"{template.format(rows=rows)} --output {folder}"
        jobs[name] = Job(f"stores/{name}", command, folder / "settings.json", kind="traces")
    return jobs


def _training(plan: Plan, name: str, out: Path, stores: Mapping[str, Job], ready: Sequence[str]) -> list[Job]:
    """Return the runs of an arm, each after `ready` and the stores that its command names."""
    template = plan.arms[name].train or ""
    steps = plan.steps_of(name)
    folders = {}
    reads = [plan.start / WEIGHTS]
    after = [*ready]
    for store, job in stores.items():
        folders[store] = job.makes.parent
        if "{" + store + "}" in template:
            after.append(job.name)
            # The stamp stands for the store: it changes when the traces are made anew.
            reads.append(out / "stores" / f"{store}.job.json")
    jobs = []
    for seed in range(1, plan.seeds + 1):
        folder = out / name / f"seed{seed}"
        command = (
            f"{template.format(seed=seed, steps=steps, **folders)} --model_name_or_path {plan.start} "
            f"--max_steps {steps} --seed {seed} --output_dir {folder}"
        )
        jobs.append(Job(f"{name}/seed{seed}", command, folder / WEIGHTS, tuple(reads), tuple(after), "training"))
    return jobs


def _evaluating(plan: Plan, name: str, out: Path, after: Sequence[str]) -> list[Job]:
    """Return a job a way of asking; each asks all runs of the arm, one after the other."""
    models = ""
    weights = []
    for seed, checkpoint in plan.checkpoints_of(name, out).items():
        models += f" --model {seed}={checkpoint}"
        weights.append(checkpoint / WEIGHTS)
    jobs = []
    for way in plan.arms[name].ways:
        folder = out / name / way
        command = f"{plan.evaluate[way].format(count=plan.count)}{models} --output {folder}"
        # Runs are asked in turn: once the last has its file, all have theirs.
        answers = folder / f"{plan.seeds_of(name)[-1]}.jsonl"
        jobs.append(Job(f"{name}/{way}", command, answers, tuple(weights), tuple(after), f"asking, {way}"))
    return jobs
