"""
What a machine has, and whether a stage of a recipe fits it; where it does not, which change makes it fit.

    python -m siq_vl.planning.doctor                                     # or: make doctor
    python -m siq_vl.planning.doctor --recipe siq-vl-0.5b --stage 2
    python -m siq_vl.planning.doctor --recipe siq-vl-0.5b --stage 2 --load_in_4bit true

The stage is 1 unless said otherwise, and any field of the recipe can be overridden, as for the training scripts.
Nothing is trained, downloaded or written. Exit status 1 says that something would break; each such line carries a fix.
What only an earlier stage has yet to make is a note.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from siq_vl import cli

if TYPE_CHECKING:  # whether these can be imported is one of the questions
    from siq_vl.training.recipes import Recipe

REPO_ROOT = Path(__file__).resolve().parents[2]
OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
GIB = 2**30

# The prediction leaves out transient tensors and what the framework itself takes.
_USABLE = 0.9
_HUB_SECONDS = 5.0
# Without these there is nothing more to find out.
_NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pillow", "jinja2", "pyyaml")
_UNLIMITED = 2**60  # cgroup v1 writes a huge number where v2 writes "max"


@dataclass(frozen=True)
class Finding:
    """One line of the report, with the fix where something would break."""

    level: str
    name: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<8} {self.name}: {self.text}"
        if self.fix:
            line += f"\n         fix: {self.fix}"
        return line


@dataclass(frozen=True)
class Device:
    """Where training would run: its name, its free bytes, and whether it computes in bfloat16."""

    name: str
    free: int
    bf16: bool
    is_gpu: bool


def check_python() -> Finding:
    """Hold this Python against `requires-python` of pyproject.toml."""
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["requires-python"].removeprefix(">=")
    here = ".".join(map(str, sys.version_info[:3]))
    text = f"{here}; {needed} or newer is needed"
    if sys.version_info < _numbers(needed):
        return Finding(PROBLEM, "Python", text, "make PYTHON=<a newer python3> demo")
    return Finding(OK, "Python", text)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements_file() -> Path:
    """Return the requirements of the installed major of transformers; of transformers 4 where there is none."""
    version = installed_version("transformers") or "4"
    name = "requirements-v5.txt"
    if _numbers(version)[0] == 4:
        name = "requirements.txt"
    return REPO_ROOT / name


def check_packages(path: Path) -> Iterator[Finding]:
    """Hold what is installed against a requirements file: missing or too old breaks, another version is a note."""
    install = f"{Path(sys.executable).name} -m pip install -r {path.name}"
    missing, others, right = [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([\w.-]+)\s*(==|>=)\s*([\w.]+)", line)
        # Comments, and lines that name another file.
        if match is None:
            continue
        package, relation, wanted = match.groups()
        here = installed_version(package)
        if here is None:
            missing.append(package)
        elif relation == ">=" and _numbers(here) < _numbers(wanted):
            missing.append(f"{package} >= {wanted} (here: {here})")
        # What follows a plus sign says how a package was built, not what it is.
        elif relation == "==" and here.partition("+")[0] != wanted:
            others.append(f"{package} {here} ({wanted} is tested)")
        else:
            right += 1
    if missing:
        yield Finding(PROBLEM, "packages", f"missing of {path.name}: {', '.join(missing)}", install)
    if others:
        yield Finding(NOTE, "packages", f"other versions than {path.name}: {', '.join(others)}")
    if right:
        yield Finding(OK, "packages", f"{right} as in {path.name}, transformers {installed_version('transformers')}")
    version = _numbers(installed_version("transformers") or "0")
    if (0,) < version < (4, 57) or version >= (6,):
        yield Finding(PROBLEM, "transformers", "4.57 and 5.x are supported", install)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def check_options() -> Iterator[Finding]:
    """Say which optional packages are here."""
    for package, module, use in (
        ("bitsandbytes", "bitsandbytes", "load_in_4bit"),
        ("flash-attn", "flash_attn", "attn_implementation flash_attention_2; sdpa does without"),
    ):
        if importlib.util.find_spec(module) is None:
            yield Finding(NOTE, package, f"not installed ({use})")
        else:
            yield Finding(OK, package, installed_version(package) or "")


def free_ram() -> int:
    """Return the bytes of memory that this process may still take, a container's limit included."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    # Files of the second version of control groups, and of the first.
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        if not limit.exists() or not used.exists():
            continue
        bound = limit.read_text().strip()
        if bound != "max" and int(bound) < _UNLIMITED:
            free = min(free, max(0, int(bound) - int(used.read_text())))
    return free


def find_device() -> Device:
    """Return the accelerator that training would take, or the CPU."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Device(torch.cuda.get_device_name(), free, torch.cuda.is_bf16_supported(), is_gpu=True)
    # Other accelerators of a desktop machine share its memory.
    if torch.accelerator.is_available():
        return Device(torch.accelerator.current_accelerator().type, free_ram(), bf16=True, is_gpu=True)
    return Device("none, the CPU trains", free_ram(), bf16=True, is_gpu=False)


def check_machine(device: Device) -> Iterator[Finding]:
    """Say what the machine computes with."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # of these, what this process may use; macOS does not say
        cores = len(os.sched_getaffinity(0))
    yield Finding(OK, "CPU", f"{cores} cores, {free_ram() / GIB:.1f} GiB of memory free")
    if not device.is_gpu:
        yield Finding(NOTE, "GPU", f"{device.name}; recipe tiny is made for that")
        return
    bf16 = "no bfloat16"
    if device.bf16:
        bf16 = "bfloat16"
    yield Finding(OK, "GPU", f"{device.name}, {device.free / GIB:.1f} GiB free, {bf16}")


def check_hub(endpoint: str, seconds: float = _HUB_SECONDS) -> Finding:
    """Ask the Hub for anything at all, and wait no longer than `seconds`, for a name server that hangs included."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(NOTE, "Hub", "not asked, HF_HUB_OFFLINE is set; recipe tiny needs no Hub")
    answers: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(endpoint, timeout=seconds) as response:
                answers.append(f"status {response.status}")
        except urllib.error.HTTPError as error:
            answers.append(f"status {error.code}")  # an answer all the same
        except (OSError, ValueError) as error:
            answers.append(f"no answer: {error}")

    # In a thread of its own, because nothing else ends a wait for a name server.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    answer = f"no answer within {seconds:g} s"
    if answers:
        answer = answers[0]
    if answer.startswith("status"):
        return Finding(OK, "Hub", f"{endpoint} answers ({answer})")
    return Finding(NOTE, "Hub", f"{endpoint}: {answer}; recipe tiny needs no Hub")


def check_inputs(recipe: "Recipe", online: bool) -> Iterator[Finding]:
    """Say what the stage starts from and reads, and what of it can be had neither here nor from the Hub."""
    yield from _check_model(recipe, online)
    yield from _check_data(recipe, online)


def _check_model(recipe: "Recipe", online: bool) -> Iterator[Finding]:
    """Look for the checkpoint that the stage starts from, or for the backbones that one is made of."""
    from siq_vl.training.recipes import backbones_of, starting_checkpoint

    if recipe.model.random_weights:
        return
    wanted = [name for name in backbones_of(recipe) if name]
    if recipe.stage != "1":
        try:
            start = starting_checkpoint(recipe)
        except ValueError as error:
            yield Finding(NOTE, "start", str(error))
        else:
            yield Finding(OK, "start", start)
            wanted = [start]
    for name in dict.fromkeys(wanted):
        yield _look_for("model", name, recipe.has(name), online, otherwise="--random_weights true, to measure only")


def _check_data(recipe: "Recipe", online: bool) -> Iterator[Finding]:
    """Look for the traces, or for the sources of the mixture."""
    from siq_vl.data.mixture_config import FIGURES

    if recipe.traces is None:
        paths = [source.path for source in recipe.data.sources if source.path != FIGURES]
        for path in dict.fromkeys(paths):
            yield _look_for("dataset", path, recipe.has(path), online, otherwise="--sources figures")
        return
    store = recipe.traces.traces
    if recipe.has(store):
        yield Finding(OK, "traces", store)
    else:
        command = f"python generate_traces.py --output {store}"
        yield Finding(NOTE, "traces", f"{store} is not there yet: {command}")


def _look_for(kind: str, name: str, here: bool, online: bool, otherwise: str) -> Finding:
    """Say where a model or data set is: here, in the Hub's cache, on the Hub, or nowhere.

    Args:
        kind: "model" or "dataset".
        name: a path, or an id on the Hub.
        here: whether it is on this machine.
        online: whether the Hub answers.
        otherwise: the option that does without it.
    """
    if here:
        return Finding(OK, kind, f"{name} is here")
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    if not is_id or Path(name).suffix in (".json", ".jsonl", ".parquet"):
        return Finding(PROBLEM, kind, f"{name} is not here", "put it there, or name another path")
    if _is_cached(kind, name):
        return Finding(OK, kind, f"{name} is in the Hub's cache")
    if online:
        return Finding(NOTE, kind, f"{name} will be downloaded")
    fix = f"connect to the Hub once, copy it here and name the folder, or pass {otherwise}"
    return Finding(PROBLEM, kind, f"{name} is not here, and the Hub does not answer", fix)


def _is_cached(kind: str, name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def check_settings(recipe: "Recipe", device: Device) -> Iterator[Finding]:
    """Say which settings of the recipe this machine cannot run, memory apart."""
    if recipe.model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        fix = f"pip install -r {requirements_file().name}, or --load_in_4bit false"
        yield Finding(PROBLEM, "load_in_4bit", "bitsandbytes is not installed", fix)
    if recipe.training.bf16 and not device.bf16:
        fix = "--bf16 false --dtype float32"
        yield Finding(PROBLEM, "bf16", f"{device.name} does not compute in bfloat16", fix)


def parse(stage: str, name: str, overrides: list[str]) -> "Recipe":
    """Return a stage of a recipe as the training scripts parse it.

    Raises:
        ValueError: as `parse_recipe`, or a setting that transformers refuses on this machine.
    """
    from siq_vl.training.recipes import parse_recipe

    return parse_recipe((stage,), ["--recipe", name, *overrides])


def memory_of(recipe: "Recipe") -> Callable[["Recipe"], int]:
    """Return a function from a recipe to its predicted bytes; model and longest row are looked at once."""
    from siq_vl.planning.plan import longest_row, memory_of_run
    from siq_vl.planning.sizes import count
    from siq_vl.training.backbones import planned_config

    config, _ = planned_config(recipe)
    sizes = count(config, recipe.stage, recipe.model)
    longest = longest_row(recipe)
    return lambda changed: memory_of_run(changed, config, sizes, longest).total


def changes(recipe: "Recipe") -> list[list[str]]:
    """Return changes that save memory and leave the effective batch size alone, each a list of options.

    From the cheapest to the dearest in speed and precision: smaller batches, gradient checkpointing, frozen weights in
    bfloat16, NF4; then all of them one upon the other.
    """
    training = recipe.training
    found = []
    smaller = []  # the last is a batch of one row
    for size in range(training.per_device_train_batch_size - 1, 0, -1):
        if training.per_device_train_batch_size % size == 0:
            smaller.append(_batch_of(size, recipe))
    found += smaller
    others = []
    if not training.gradient_checkpointing:
        others.append(["--gradient_checkpointing", "true"])
    if training.bf16 and recipe.model.dtype == "float32":
        others.append(["--dtype", "bfloat16"])
    four_bit = importlib.util.find_spec("bitsandbytes") is not None and recipe.stage != "1"
    if four_bit and not recipe.model.load_in_4bit:
        others.append(["--load_in_4bit", "true"])
    found += others
    pile: list[str] = []
    if smaller:
        pile += smaller[-1]
    for other in others:
        pile = [*pile, *other]
        if pile not in found:  # where the batch is one row already, the first of them is no pile
            found.append(pile)
    return found


def _batch_of(size: int, recipe: "Recipe") -> list[str]:
    """Return the options for a smaller batch that leave the effective batch size alone."""
    training = recipe.training
    options = ["--per_device_train_batch_size", str(size)]
    if not recipe.run.effective_batch_size:
        accumulation = training.gradient_accumulation_steps * (training.per_device_train_batch_size // size)
        options += ["--gradient_accumulation_steps", str(accumulation)]
    return options


def check_memory(stage: str, name: str, overrides: list[str], free: int, place: str) -> Finding:
    """Hold the predicted memory against what is free; where it does not fit, name the first change that does.

    Args:
        stage: "1", "2" or "3".
        name: the recipe.
        overrides: options that the recipe is overridden with.
        free: free bytes of the device.
        place: what to call them.
    """
    recipe = parse(stage, name, overrides)
    predict = memory_of(recipe)
    needed, usable = predict(recipe), _USABLE * free
    sums = f"{needed / GIB:.1f} GiB predicted, {free / GIB:.1f} GiB free on {place}"
    if needed <= usable:
        return Finding(OK, "memory", sums)
    for options in changes(recipe):
        smaller = predict(parse(stage, name, [*overrides, *options]))
        if smaller <= usable:
            return Finding(PROBLEM, "memory", sums, f"{' '.join(options)} ({smaller / GIB:.1f} GiB predicted)")
    return Finding(PROBLEM, "memory", sums, "no setting of this recipe fits: a larger device, or a smaller recipe")


def check_disk(recipe: "Recipe") -> Finding:
    """Hold what the stage writes against the free space: float32 weights, and the trainer's own checkpoints."""
    from siq_vl.planning.sizes import count
    from siq_vl.training.backbones import planned_config

    config, _ = planned_config(recipe)
    sizes = count(config, recipe.stage, recipe.model)
    needed = 4 * (sizes.total - sizes.pooling_head)
    if recipe.training.save_strategy != "no":
        # A new one is written before the oldest goes. Each has what trains, and AdamW's two moments of it.
        checkpoints = (recipe.training.save_total_limit or 1) + 1
        needed += checkpoints * 12 * sizes.trainable
    folder = Path(recipe.training.output_dir).absolute()
    # The run will make the folder: its disk is that of the first parent that is there.
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{needed / GIB:.2f} GiB written, {free / GIB:.1f} GiB free"
    if needed > free:
        return Finding(PROBLEM, "disk", text, "--output_dir on a larger disk")
    return Finding(OK, "disk", text)


def examine(stage: str, name: str, overrides: list[str]) -> Iterator[Finding]:
    """Yield every finding; without the packages that the rest is made of, only what can be said."""
    yield check_python()
    yield from check_packages(requirements_file())
    if any(installed_version(package) is None for package in _NEEDED):
        return
    from huggingface_hub.constants import ENDPOINT

    yield from check_options()
    device = find_device()
    yield from check_machine(device)
    hub = check_hub(ENDPOINT)
    yield hub
    try:
        recipe = parse(stage, name, overrides)
    except ValueError as error:
        yield Finding(PROBLEM, "recipe", " ".join(str(error).split()), "as it says")
        return
    yield from check_inputs(recipe, hub.level == OK)
    yield from check_settings(recipe, device)
    place = "this machine"
    if device.is_gpu:
        place = "the GPU"
    try:
        yield check_memory(stage, name, overrides, device.free, place)
        yield check_disk(recipe)
    except OSError as error:
        # A backbone whose sizes are known neither here nor from the Hub; `check_inputs` has said what to do.
        yield Finding(NOTE, "memory", f"not predicted, the model cannot be read: {' '.join(str(error).split())[:160]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="a folder of recipes/")
    parser.add_argument("--stage", choices=("1", "2", "3"), default="1")
    options, overrides = parser.parse_known_args()
    cli.say(f"recipe {options.recipe}, stage {options.stage}\n")
    broken = 0
    for finding in examine(options.stage, options.recipe, overrides):
        cli.say(str(finding))
        broken += finding.level == PROBLEM
    if broken:
        cli.say(f"\n{broken} problems")
    else:
        cli.say("\nnothing would break")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    cli.run(main)
