"""The plan of an ablation, read from YAML, and the jobs that it takes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zlib import crc32

import yaml

from siq_vl.ablation.jobs import Job

WEIGHTS = "model.safetensors"
START = "start"  # what the arm without training is called among seeds


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        about: what it is, in a line.
        train: the training command; None for the starting checkpoint as it is.
        steps: its optimizer steps, as a multiple of the plan's.
        ways: the ways in which it is asked, of the plan's `evaluate`.
    """

    about: str
    train: str | None = None
    steps: float = 1.0
    ways: tuple[str, ...] = ("answers",)


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
        """Return the plan with these arms alone.

        Raises:
            ValueError: there is no such arm.
        """
        names = list(names)
        for name in names:
            if name not in self.arms:
                raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(self.arms)}")
        kept = {name: arm for name, arm in self.arms.items() if name in names}
        pairs = tuple(pair for pair in self.compare if set(pair) <= set(kept))
        return Plan(**{**vars(self), "arms": kept, "compare": pairs})


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
    given |= {name: value for name, value in overrides.items() if value is not None}
    _check_fields(given, Plan, str(path))
    arms = {}
    for name, settings in given["arms"].items():
        _check_fields(settings, Arm, f"arm {name!r}", partly=True)
        arms[name] = Arm(**{**settings, "ways": tuple(settings.get("ways", ("answers",)))})
    pairs = tuple((first, second) for first, second in given["compare"])
    return Plan(**{**given, "start": Path(given["start"]), "arms": arms, "compare": pairs})


def _check_fields(given: dict, kind: type, where: str, partly: bool = False) -> None:
    names = [field.name for field in fields(kind)]
    for name in given:
        if name not in names:
            raise ValueError(f"{where} has a field {name!r}; the fields are {', '.join(names)}")
    missing = [name for name in (("about",) if partly else names) if name not in given]
    if missing:
        raise ValueError(f"{where} lacks the field {missing[0]!r}")


def seed_names(plan: Plan, arm: Arm) -> list[str]:
    """Return what the runs of an arm are called."""
    return [f"seed{seed}" for seed in range(1, plan.seeds + 1)] if arm.train else [START]


def checkpoint_of(plan: Plan, name: str, seed: str, out: Path) -> Path:
    """Return the folder of a run's checkpoint."""
    return plan.start if seed == START else out / name / seed


def jobs_of(plan: Plan, out: Path) -> list[Job]:
    """Return the jobs of a plan: what prepares it, then arm by arm its runs and its evaluations."""
    prepared = [
        Job(f"prepare/{name}", step["run"], Path(step["makes"]) / WEIGHTS, after=_after(step), kind=name, once=True)
        for name, step in plan.prepare.items()
    ]
    ready = tuple(job.name for job in prepared)
    stores = _stores(plan, out)
    jobs = [*prepared, *stores.values()]
    for name, arm in plan.arms.items():
        runs = _training(plan, name, arm, out, stores, ready) if arm.train else []
        jobs += [*runs, *_evaluating(plan, name, arm, out, tuple(run.name for run in runs) or ready)]
    wanted = {name for job in jobs for name in job.after}
    return [job for job in jobs if job not in stores.values() or job.name in wanted]


def _after(step: dict[str, str]) -> tuple[str, ...]:
    return (f"prepare/{step['after']}",) if "after" in step else ()


def _stores(plan: Plan, out: Path) -> dict[str, Job]:
    """Return the jobs that make the traces; another command makes another folder, so that no store is a mixture."""
    rows = int(plan.steps * plan.batch * 1.2)  # more than a run takes, so that other seeds draw other questions
    made = {}
    for name, command in plan.stores.items():
        folder = out / "stores" / f"{name}-{crc32(command.encode()):08x}"
        filled = f"{command.format(rows=rows)} --output {folder}"
        made[name] = Job(f"stores/{name}", filled, folder / "settings.json", kind="traces")
    return made


def _training(plan: Plan, name: str, arm: Arm, out: Path, stores: dict[str, Job], ready: tuple[str, ...]) -> list[Job]:
    steps = round(plan.steps * arm.steps)
    folders = {store: job.makes.parent for store, job in stores.items()}
    read = [store for store in stores if "{" + store + "}" in arm.train]
    jobs = []
    for seed in range(1, plan.seeds + 1):
        folder = out / name / f"seed{seed}"
        command = (
            f"{arm.train.format(seed=seed, steps=steps, **folders)} --model_name_or_path {plan.start} "
            f"--max_steps {steps} --seed {seed} --output_dir {folder}"
        )
        stamps = tuple(out / "stores" / f"{store}.job.json" for store in read)
        after = (*ready, *(stores[store].name for store in read))
        reads = (plan.start / WEIGHTS, *stamps)
        jobs.append(Job(f"{name}/seed{seed}", command, folder / WEIGHTS, reads, after, "training"))
    return jobs


def _evaluating(plan: Plan, name: str, arm: Arm, out: Path, after: Sequence[str]) -> list[Job]:
    checkpoints = {seed: checkpoint_of(plan, name, seed, out) for seed in seed_names(plan, arm)}
    models = " ".join(f"--model {seed}={folder}" for seed, folder in checkpoints.items())
    weights = tuple(folder / WEIGHTS for folder in checkpoints.values())
    jobs = []
    for way in arm.ways:
        folder = out / name / way
        command = f"{plan.evaluate[way].format(count=plan.count)} {models} --output {folder}"
        made = folder / f"{list(checkpoints)[-1]}.jsonl"
        jobs.append(Job(f"{name}/{way}", command, made, weights, tuple(after), f"asking, {way}"))
    return jobs
