"""Every command and every Python block of the documents is run in a copy of the repo, after those whose results it needs.

The README comes first: what it trains is there for the pages of `docs/`. A command that several documents show is run once.
A new command needs one line in `HOW`. What takes long gets options that make it short; what needs several machines or
full-size backbones is planned (`--dry_run`) by the real parser; servers and the Hub are stood in for.
"""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from processes import CONTEXT
from test_coco import write_miniature

REPO_ROOT = Path(__file__).resolve().parent.parent
PATHS = (REPO_ROOT / "README.md", *sorted((REPO_ROOT / "docs").glob("**/*.md")), REPO_ROOT / "CONTRIBUTING.md")
DOCUMENTS = {path.relative_to(REPO_ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README = DOCUMENTS["README.md"]
SECONDS = 240


@dataclass(frozen=True)
class Run:
    """A script, or `accelerate launch` with one.

    Attributes:
        add: options that make it short, appended.
        swap: what stands for something else in the document, and what is put in its place.
        says: what it has to print.
        launched: start it through `accelerate launch` itself, not only through its parser.
        makes: later commands need what it leaves.
    """

    add: str = ""
    swap: dict[str, str] = field(default_factory=dict)
    says: str = ""
    launched: bool = False
    makes: bool = False


@dataclass(frozen=True)
class Target:
    """A target of the Makefile, which has to run `runs`; what it runs is tested elsewhere."""

    runs: str


@dataclass(frozen=True)
class Shell:
    """A line for a shell."""

    swap: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Elsewhere:
    """A script that the tests of another file run; it is there, and that file names it."""

    path: str


@dataclass(frozen=True)
class Packages:
    """An installation: the file has to name these packages."""

    path: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Serve:
    """A server: it has to answer at `path`; on transformers 4 it has to refuse with `refusal`, if there is one."""

    path: str
    refusal: str = ""


TINY = "--max_steps 2 --effective_batch_size 2 --dataloader_num_workers 0"
PLAN = "--dry_run true"
HOW = {
    "python3 -m venv .venv && . .venv/bin/activate": Shell({"-m venv": "-m venv --without-pip"}),
    "pip install -r requirements.txt": Packages("requirements.txt", ("torch", "transformers", "trl", "peft")),
    'python ask.py docs/example.png "What is the difference between Mar and Jan?"': Run(
        says="reasoning: rows: Jan 19, Mar 2, Apr 3, Nov 12. Mar 2. Jan 19. 19 - 2 = 17\nanswer: 17\n"
    ),
    'python ask.py docs/example.png "What is the difference between Mar and Jan?" --no_thinking': Run(says="answer: 2"),
    "python -m siq_vl.data.figures gallery.png": Run(),
    'python ask.py docs/example.png "What is the difference between Mar and Jan?" --max_thinking_tokens 16': Run(
        says="answer: "
    ),
    "make app": Target("python app.py"),
    "pip install -r requirements-app.txt": Packages("requirements-app.txt", ("gradio",)),
    'python app.py --model "stage 2=outputs/tiny/stage2" --model "stage 3=outputs/tiny/stage3"': Elsewhere(
        "tests/test_app.py"
    ),
    "make demo": Target("python demo.py"),
    "make test": Target("python -m pytest"),
    "make test-v5": Target("python -m pytest"),
    "make test-majors": Target("tests/test_majors.py"),
    "make test-hf": Target("tests/test_hf_mixins.py"),
    "make test-newest": Target("-m pytest"),
    "make test-export": Target("tests/test_onnx.py"),
    "make test-gguf": Target("tests/test_gguf.py"),
    "make web": Target("export_web.py"),
    "python benchmarks/engines.py --count 100 --engines onnxruntime node llama.cpp chromium": Elsewhere(
        "tests/test_gguf.py"
    ),
    "python benchmarks/exports.py": Elsewhere("tests/test_gguf.py"),
    "python export_onnx.py outputs/tiny/stage3 outputs/onnx": Elsewhere("tests/test_onnx.py"),
    "python export_gguf.py outputs/tiny/stage3 outputs/gguf": Elsewhere("tests/test_gguf.py"),
    "python export_web.py outputs/tiny/stage3 outputs/page --kind int8": Elsewhere("tests/test_web.py"),
    "make rehearsal": Target("-m rehearsal.walk"),
    "make rehearsal-quick": Target("-m rehearsal.walk --quick"),
    # What is not of this project is looked up by the shell, and not run.
    "hf download --repo-type dataset liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json --local-dir data": Shell(
        {"hf download": "true hf download"}
    ),
    "curl -O http://images.cocodataset.org/zips/train2017.zip": Shell({"curl": "true curl"}),
    "unzip -q train2017.zip -d data/coco": Shell({"unzip": "true unzip"}),
    "python benchmarks/step.py": Run("--quick", says="tokens/s"),
    "make gpu": Target("benchmarks/gpu.py"),
    "python benchmarks/gpu.py --device cpu --quick": Elsewhere("tests/test_gpu_benchmark.py"),
    "make mutants": Target("tests/mutate.py"),
    "make check": Target("mypy"),
    "make coverage": Target("--cov"),
    "make doctor": Target("-m siq_vl.planning.doctor"),
    ".venv/bin/pre-commit install": Packages("requirements-dev.txt", ("pre-commit",)),
    ".venv/bin/python -m pytest tests/test_resume.py -k killed": Run(
        "--collect-only", swap={".venv/bin/python": "python"}, says="tests/test_resume.py::"
    ),
    ".venv/bin/python -m siq_vl.planning.doctor --recipe tiny --stage 2": Run(
        swap={".venv/bin/python": "python"}, says="GiB predicted"
    ),
    "python benchmarks/anyres.py --count 300": Run("--count 1", says="all tiles and the thumbnail"),
    "accelerate launch train_sft.py --stage 1": Run(TINY, launched=True, makes=True),
    "accelerate launch train_sft.py --stage 2": Run(TINY, makes=True),
    "python generate_traces.py --teacher figures --style structured --count 14720 --output outputs/tiny/traces": Run(
        "--count 40", makes=True
    ),
    "accelerate launch train_distill.py": Run(TINY, makes=True),
    "python evaluate_vqa.py --model stage3=outputs/tiny/stage3": Run("--count 5 --max_new_tokens 8"),
    "python evaluate_vqa.py --model tiny=. --shifts --count 300": Run(
        "--count 5 --max_new_tokens 2", says="moved by 6 px"
    ),
    "python train_sft.py --stage 1 --recipe siq-vl-0.5b --dry_run": Run(says="849,639,168"),
    "accelerate launch train_sft.py --stage 2 --recipe siq-vl-0.5b --load_in_4bit true": Run(PLAN, says="38,863,744"),
    "accelerate launch --config_file accelerate_configs/ddp.yaml train_sft.py --stage 1 --recipe siq-vl-0.5b": Run(
        PLAN
    ),
    "accelerate launch --config_file accelerate_configs/ddp.yaml --num_machines 2 --num_processes 16 --machine_rank 0 "
    "--main_process_ip HOST --main_process_port 29500 train_sft.py --stage 1 --recipe siq-vl-0.5b": Run(PLAN),
    "python train_sft.py --stage 1 --recipe siq-vl-0.5b --random_weights true --sources figures": Run(
        PLAN, says="random weights"
    ),
    "python train_distill.py --recipe siq-vl-0.5b --variant internvl_chartqa --dry_run": Run(says="12,469,120"),
    "python train_distill.py --recipe siq-vl-0.5b --variant qwen3vl_cocoqa --dry_run": Run(says="5,833,600"),
    "python train_distill.py --recipe siq-vl-0.5b --variant hunyuanocr --dry_run": Run(says="12,469,120"),
    "python train_distill.py --recipe siq-vl-0.5b --dry_run": Run(says="Plan of stage 3"),
    "python generate_traces.py --teacher figures --count 14720 --duplicates none --output outputs/tiny/traces": Run(
        "--count 40", makes=True
    ),
    "python train_distill.py --variant union --emergence_steps 50": Run(
        f"{TINY} --emergence_steps 2 --emergence_count 6"
    ),
    "python -m siq_vl.training.store_features --stage 2 --recipe tiny": Run(TINY),
    "python train_sft.py --stage 2 --recipe siq-vl-0.5b --batching packed --pack_tokens 4096 --dry_run": Run(),
    **{
        f"python benchmarks/{name}.py": Elsewhere("tests/test_benchmarks.py")
        for name in (
            *("training", "idefics3", "generation", "start_up", "checkpointing", "loader", "memory", "scaling", "fits"),
            "questions",
        )
    },
    "python -m siq_vl.planning.doctor --recipe siq-vl-0.5b --stage 2 --random_weights true --sources figures": Run(
        says="GiB predicted"
    ),
    "python -m siq_vl.planning.sizes --language_model Qwen/Qwen2.5-1.5B-Instruct --lora_r 16": Run(says="Qwen2.5-1.5B"),
    "python generate_traces.py --teacher figures --count 300": Run("--count 12", says="new traces", makes=True),
    "python generate_traces.py --teacher transformers --model Qwen/Qwen3-VL-2B-Instruct --questions mine.jsonl": Run(
        swap={"Qwen/Qwen3-VL-2B-Instruct": "."}, add="--trust_remote_code --max_new_tokens 64 --output outputs/local"
    ),
    "python generate_traces.py --teacher transformers --model OpenGVLab/InternVL3_5-2B-HF "
    "--source HuggingFaceM4/ChartQA --count 5000": Run(
        "--trust_remote_code --max_new_tokens 64 --output outputs/charts",
        swap={"OpenGVLab/InternVL3_5-2B-HF": ".", "HuggingFaceM4/ChartQA": "data/ChartQA"},
        says="1 new traces",
    ),
    "python generate_traces.py --teacher transformers --model Qwen/Qwen3-VL-2B-Instruct --describe caption ocr": Run(
        "--trust_remote_code --max_new_tokens 8", swap={"Qwen/Qwen3-VL-2B-Instruct": "."}, says="2 new traces"
    ),
    "python generate_traces.py --teacher openai --model NAME --base_url http://a:8000/v1 http://b:8000/v1 "
    "--questions mine.jsonl": Run(says="2 new traces", makes=True),
    'python evaluate_vqa.py --model "stage 1=outputs/tiny/stage1" --model "stage 3=outputs/tiny/stage3" '
    "--report page.html": Run("--count 5 --max_new_tokens 8"),
    "python evaluate_vqa.py --model stage3=outputs/siq-vl-0.5b/stage3 --source path/to/ChartQA --split test": Run(
        "--max_new_tokens 8 --output outputs/chartqa",
        swap={"outputs/siq-vl-0.5b/stage3": "outputs/tiny/stage3", "path/to/ChartQA": "data/ChartQA"},
    ),
    "python evaluate_vqa.py --model baseline=outputs/tiny/stage2 --model student=outputs/tiny/stage3 --before_after "
    "--card": Run("--count 10 --max_new_tokens 8", says="correct rate"),
    "python -m siq_vl.evaluation.coco pope instances_val2014.json pope.jsonl --negatives adversarial": Run(
        says="12 questions", makes=True
    ),
    "python evaluate_vqa.py --model stage3=outputs/siq-vl-0.5b/stage3 --source pope.jsonl --image_folder val2014 "
    "--metric yes_no": Run(
        "--max_new_tokens 4 --output outputs/pope", swap={"outputs/siq-vl-0.5b/stage3": "."}, says="| F1 "
    ),
    "python -m siq_vl.evaluation.coco chair instances_val2014.json chair.jsonl --captions captions_val2014.json": Run(
        says="2 questions", makes=True
    ),
    "python evaluate_vqa.py --model stage3=outputs/siq-vl-0.5b/stage3 --source chair.jsonl --image_folder val2014 "
    "--output outputs/chair": Run("--max_new_tokens 4", swap={"outputs/siq-vl-0.5b/stage3": "."}, makes=True),
    "python -m siq_vl.evaluation.coco score chair.jsonl outputs/chair/stage3.jsonl": Run(says="CHAIRs"),
    "python ablate.py": Run(
        "--only structured --seeds 1 --steps 2 --count 30 --output outputs/short", says="structured"
    ),
    "python ablate.py --list": Run(says="three_teachers"),
    "python ablate.py --only control structured terse --seeds 5 --steps 460": Run("--list", says="terse"),
    "python serve.py outputs/tiny/stage3 --port 8000": Serve("/health", "only transformers 5 can serve pictures"),
    "python export_idefics3.py outputs/tiny/stage3 outputs/idefics3 --widen_tower": Run(),
    "accelerate launch train_sft.py --stage 1 --vision_tower backbones/siglip2-tiny "
    "--language_model backbones/qwen2.5-tiny": Run(f"{TINY} --output_dir outputs/mine"),
}
# What the documents leave to their reader, in Python blocks.
PLACES = {"path/to/siq-vl": "."}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands_of(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    commands = (re.sub(r"\s+#\s.*$", "", line) for line in lines if not line.lstrip().startswith("#"))
    return [" ".join(command.split()) for command in commands if command.strip()]


def steps() -> dict[tuple[str, str], str]:
    """The documents' commands and Python blocks, `(language, text)`, in order, and where each is shown first."""
    found: dict[tuple[str, str], str] = {}
    for name, document in DOCUMENTS.items():
        for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", document, re.MULTILINE | re.DOTALL):
            for text in commands_of(block) if language == "bash" else [block]:
                found.setdefault((language, text), name)
    return found


def in_the_copy(folder: str, log: str, arguments: list[str]) -> None:
    """What a process of its own does: run a script, a module (`-m`), a text (`-c`), or what accelerate would launch."""
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "siq_vl"]:
        del sys.modules[name]  # of the repo, where the process was made from one that has it
    # Neither the repo nor code that tests before this one have loaded from other checkpoints.
    others = [path for path in sys.path if path not in ("", str(REPO_ROOT))]
    sys.path[:] = [folder, *(path for path in others if not Path(path, "transformers_modules").is_dir())]
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    import datasets
    import huggingface_hub
    from transformers import dynamic_module_utils

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache", "datasets")
    dynamic_module_utils.HF_MODULES_CACHE = str(Path(folder, "cache", "modules"))
    if arguments[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(arguments[2:])
        if launch.config_file and not Path(launch.config_file).is_file():
            sys.exit(f"there is no {launch.config_file}")
        arguments = [launch.training_script, *launch.training_script_args]
    else:
        arguments = arguments[1:]
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    if arguments[0] == "-c":
        exec(compile(arguments[1], "document", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


class Copy:
    """A copy of the repo, with the files that the documents take for granted."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, set()
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", "outputs", "node_modules", "__pycache__", ".*_cache", ".hypothesis", "*.log"
        )
        shutil.copytree(REPO_ROOT, folder, ignore=ignored)
        picture = shutil.copy(folder / "docs" / "example.png", folder / "mine.png")
        asked = [
            {"question": f"How much is {n} + 2?", "image": Path(picture).name, "answer": str(n + 2)} for n in (3, 4)
        ]
        (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        write_miniature(folder, "instances_val2014.json", "captions_val2014.json", "val2014")
        charts = folder / "data" / "ChartQA"
        charts.mkdir(parents=True)
        shutil.copy(picture, charts)
        rows = [{"query": "How much is Mar?", "label": ["2"], "image": "mine.png"}]
        for split in ("train", "test"):
            (charts / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        album = [{"photo": "../mine.png", "asked": "What is shown?", "said": "A chart."}]
        (folder / "data" / "album.jsonl").write_text("".join(json.dumps(row) + "\n" for row in album))

    def start(self, arguments: list[str]):
        log = self.folder / "step.log"
        process = CONTEXT.Process(target=in_the_copy, args=(str(self.folder), str(log), arguments))
        process.start()
        return process, log

    def run(self, arguments: list[str]) -> str:
        process, log = self.start(arguments)
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
        printed = log.read_text(errors="replace")
        # 1 from the doctor says that something would break on this machine, and is an answer.
        assert process.exitcode == 0 or (process.exitcode == 1 and "siq_vl.planning.doctor" in arguments), printed[
            -3000:
        ]
        return printed


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return Copy(tmp_path_factory.mktemp("readme") / "siq-vl")


def swapped(text: str, swap: dict[str, str]) -> str:
    for name, other in swap.items():
        assert name in text
        text = text.replace(name, other)
    return text


def run_command(copy: Copy, command: str, how: Run) -> None:
    swap = dict(how.swap)
    with contextlib.ExitStack() as stack:
        if "http://a:8000/v1" in command:
            from chat_server import serving

            address = stack.enter_context(serving())[1]
            swap |= {"http://a:8000/v1": address, "http://b:8000/v1": address}
        arguments = shlex.split(f"{swapped(command, swap)} {how.add}")
        if how.launched:
            launcher = [sys.executable, "-m", "accelerate.commands.launch", *arguments[2:]]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            environment.pop("PYTHONPATH", None)
            ran = subprocess.run(launcher, cwd=copy.folder, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr[-3000:]
            printed = ran.stdout + ran.stderr
        else:
            printed = copy.run(arguments)
    assert how.says in printed


def serve(copy: Copy, command: str, how: Serve) -> None:
    import transformers

    if how.refusal and transformers.__version__.startswith("4."):
        process, log = copy.start(shlex.split(command))
        process.join(SECONDS)
        assert process.exitcode == 1 and how.refusal in log.read_text()
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process, log = copy.start(shlex.split(re.sub(r"(--port) \d+", rf"\1 {port}", command)))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        until = time.monotonic() + SECONDS
        while True:
            assert process.is_alive() and time.monotonic() < until, log.read_text()[-3000:]
            with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}{how.path}", timeout=5) as answer:
                assert answer.status == 200
                return
            time.sleep(0.2)
    finally:
        process.kill()
        process.join()


def check_packages(how: Packages) -> None:
    from packaging.requirements import Requirement

    lines = [line.strip() for line in (REPO_ROOT / how.path).read_text().splitlines()]
    assert set(how.names) <= {Requirement(line).name for line in lines if line and not line.startswith(("#", "-r"))}


def check_elsewhere(command: str, how: Elsewhere) -> None:
    script = Path(shlex.split(command)[1])
    assert (REPO_ROOT / script).is_file() and script.stem in (REPO_ROOT / how.path).read_text()


def make_what_is_needed(copy: Copy, step: tuple[str, str]) -> None:
    """Run the commands before a step whose results others need, as far as their own tests have not run yet."""
    for earlier in steps():
        if earlier == step:
            return
        how = HOW.get(earlier[1])
        if isinstance(how, Run) and how.makes:
            run_once(copy, earlier[1], how)


def run_once(copy: Copy, command: str, how: Run) -> None:
    if command not in copy.made:
        run_command(copy, command, how)
        copy.made.add(command)


@pytest.mark.parametrize(
    ("language", "text"), steps(), ids=[f"{name}: {' '.join(text.split())[:70]}" for (_, text), name in steps().items()]
)
def test_the_readme_runs(copy, language, text):
    make_what_is_needed(copy, (language, text))
    if language == "python":
        for name, other in PLACES.items():
            text = text.replace(name, other)
        copy.run(["python", "-c", text])
        return
    how = HOW.get(text)
    match how:
        case None:
            pytest.fail(f"a document has a command that no test runs; give it a line in HOW of this file: {text}")
        case Run():
            run_once(copy, text, how)
        case Target():
            told = subprocess.run(["make", "-n", *text.split()[1:]], cwd=copy.folder, capture_output=True, text=True)
            assert told.returncode == 0 and how.runs in told.stdout, told.stderr
        case Shell():
            subprocess.run(["bash", "-ec", swapped(text, how.swap)], cwd=copy.folder, check=True)
        case Packages():
            check_packages(how)
        case Elsewhere():
            check_elsewhere(text, how)
        case Serve():
            serve(copy, text, how)


def test_the_output_shown_is_what_the_command_says():
    (shown,) = [block for document in DOCUMENTS.values() for block in blocks("text", document)]
    assert shown in [how.says for how in HOW.values() if isinstance(how, Run)]


def test_no_line_of_the_table_is_left_over():
    assert HOW.keys() <= {text for language, text in steps() if language == "bash"}


def test_the_readme_is_short():
    """A person finishes it; the rest is in docs/, and the README names every page."""
    assert len(README.splitlines()) <= 250
    pages = [name for name in DOCUMENTS if name not in ("README.md", "docs/ablations.md")]
    assert [name for name in pages if f"({name})" not in README] == []


def test_no_sentence_is_said_twice():
    """In the documents that people write; a table or a command may be shown where it is needed."""
    said: dict[str, str] = {}
    for name, document in DOCUMENTS.items():
        prose = re.sub(r"\A---\n.*?^---\n|^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^[|#].*$", "", prose, flags=re.MULTILINE)
        for paragraph in re.split(r"\n\s*\n|^\s*(?:-|\d\.) ", prose, flags=re.MULTILINE):
            for sentence in re.split(r"(?<=[.?!]) ", " ".join(paragraph.split())):
                if len(sentence.split()) >= 8:
                    assert sentence not in said, f"{name} says what {said[sentence]} says: {sentence}"
                    said[sentence] = name


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_inline_commands_exist(document):
    """Commands in running text name scripts, modules and targets that are there, and paths in it lead somewhere."""
    targets = set(re.findall(r"^([\w-]+):", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)):
        if made := re.match(r"make ([\w-]+)", code):
            assert made.group(1) in targets, code
        if script := re.match(r"python (\S+\.py)", code):
            assert (REPO_ROOT / script.group(1)).is_file(), code
        if module := re.match(r"python -m (siq_vl[\w.]*)", code):
            path = REPO_ROOT / module.group(1).replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), code
        if re.fullmatch(r"(?:siq_vl|pretraining|backbones|recipes|tests|benchmarks|docs)/[\w./-]*", code):
            assert (REPO_ROOT / code).exists(), code


def anchors(document: str) -> set[str]:
    """The names that a document's headings are linked by."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_exist(name):
    """Links lead from the document's folder to a file, and to a heading of it where they name one."""
    links = [link for pair in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', DOCUMENTS[name]) for link in pair if link]
    if name == "README.md":
        assert "docs/architecture.svg" in links and "LICENSE" in links
    for link in links:
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (REPO_ROOT / name).parent / path if path else REPO_ROOT / name
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


def test_paths_in_tables_exist():
    """Paths, from the root of the repo, in the first lines of tables."""
    lines = [line for document in DOCUMENTS.values() for line in document.splitlines() if line.startswith("| `")]
    named = [path for line in lines for path in re.findall(r"`([^`]+)`", line)]
    assert "siq_vl/data" in named
    for path in named:
        if "/" in path or "." in path:
            assert (REPO_ROOT / path).exists(), path


def test_the_recipe_shown_parses():
    from siq_vl.training.arguments import DataArguments

    shown = [block for document in DOCUMENTS.values() for block in blocks("yaml", document)]
    assert len(shown) == 1
    for block in shown:
        sources = DataArguments(**yaml.safe_load(block)).sources
        assert [source.path for source in sources] == ["HuggingFaceM4/FineVision", "data/llava_instruct_150k.json"]


def test_the_formats_shown_are_those_that_are_told():
    from siq_vl.data.adapters import FORMATS, recognise

    rows = re.findall(r"^\| `(\w+)` \| (`.*) \|$", DOCUMENTS["docs/data.md"], re.MULTILINE)
    assert {name for name, _ in rows} == FORMATS.keys()
    for name, told in rows:
        for columns in told.split("; or "):
            assert recognise(re.findall(r"`(\w+)`", columns)) == name


def test_the_card_says_what_the_table_says():
    card = yaml.safe_load(README.split("---\n")[1])
    assert card["library_name"] == "transformers" and card["pipeline_tag"] == "image-text-to-text"
    assert card["license"] == "apache-2.0" and "Apache License" in (REPO_ROOT / "LICENSE").read_text()
    (result,) = card["model-index"][0]["results"]
    (overall,) = re.findall(r"^\| all +\| 900 \|.*\| +([\d.]+) ± [\d.]+ \|$", README, re.MULTILINE)
    assert result["metrics"][0]["value"] == float(overall)
