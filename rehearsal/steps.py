"""The steps of the real path: the commands of README and docs, word for word, and what makes each of them short."""

from dataclasses import dataclass
from pathlib import Path

SIZES = ("siq-vl-0.5b", "siq-vl-1.5b")
INTERNVL, QWEN, HUNYUAN = "OpenGVLab/InternVL3_5-2B-HF", "Qwen/Qwen3-VL-2B-Instruct", "tencent/HunyuanOCR"
TRACES = "outputs/traces"
# What shortens a training, and nothing else; the recipes' own numbers stand in docs/hub.md.
SHORT = (
    "--max_steps 2 --effective_batch_size 2 --per_device_train_batch_size 1 --dataloader_num_workers 0 --logging_steps 1 "
    "--sample_steps 0 --eval_steps 1 --save_steps 1"
)
# Of a few questions the recipes' share for validation would be none.
FEW = "--validation_share 0.2"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step, unique.
        command: as the documents have it.
        short: options that make it short, appended.
        makes: files that it has to leave, below the working folder.
        says: what it has to print, a regular expression.
        refuses: it has to fail, with a message that this regular expression fits.
        needs: steps that must have been done.
        majors: of transformers that it is for.
        quick: it is part of the quick form.
    """

    name: str
    command: str
    short: str = ""
    makes: tuple[str, ...] = ()
    says: str = ""
    refuses: str = ""
    needs: tuple[str, ...] = ()
    majors: tuple[str, ...] = ("4", "5")
    quick: bool = False


def all_steps(major: str, count: int = 24) -> list[Step]:
    """Return the steps for a major of transformers, in their order.

    Args:
        major: `"4"` or `"5"`.
        count: questions that each teacher is asked.
    """
    steps = [*_coco(), *_traces(count)]
    for size in SIZES:
        steps += _stages(size, major)
        steps += _evaluation(size)
        steps += _push(size)
    return [step for step in steps if major in step.majors]


def quick_steps(major: str) -> list[Step]:
    """Return the steps of the quick form: one size, one teacher, few rows."""
    return [step for step in all_steps(major, count=8) if step.quick]


def _coco() -> list[Step]:
    """COCO by hand: LLaVA-Instruct as its authors published it."""
    return [
        Step(
            "LLaVA-Instruct, its file",
            "hf download --repo-type dataset liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json --local-dir data",
            makes=("data/llava_instruct_150k.json",),
        ),
    ]


def _traces(count: int) -> list[Step]:
    base = f"python generate_traces.py --teacher transformers --output {TRACES}"
    asked = (
        ("InternVL on ChartQA (A.4)", INTERNVL, "--source HuggingFaceM4/ChartQA --task chart", ("4", "5"), True),
        ("Qwen3-VL on COCO-QA (A.5)", QWEN, "--source HuggingFaceM4/FineVision --subset cocoqa --task scene", ("4", "5"), False),
        ("HunyuanOCR on OCR-VQA (A.6)", HUNYUAN, "--source HuggingFaceM4/FineVision --subset ocrvqa --task document", ("5",), False),
    )  # fmt: skip
    steps = []
    for name, teacher, source, majors, quick in asked:
        command = f"{base} --model {teacher} {source}"
        steps.append(
            Step(
                f"traces of {name}",
                command,
                f"--count {count}",
                makes=(f"{TRACES}/data", f"{TRACES}/README.md"),
                majors=majors,
                quick=quick,
            )
        )
        if majors == ("5",):
            refusal = "requirements-v5"
            steps.append(Step(f"refused: {name}", command, f"--count {count}", refuses=refusal, majors=("4",)))
    steps.append(
        Step(
            "captions (A.5)",
            f"python generate_traces.py --teacher transformers --output {TRACES} --model {QWEN} --describe caption ocr",
            makes=(f"{TRACES}/descriptions/data",),
            needs=("traces of Qwen3-VL on COCO-QA (A.5)",),
        )
    )
    wrong = INTERNVL.removesuffix("-HF")
    command = f"{base} --model {wrong} --source HuggingFaceM4/ChartQA"
    steps.append(Step("refused: InternVL in its first form", command, "--count 2", refuses="InternVL3_5-2B-HF"))
    return steps


def _stages(size: str, major: str) -> list[Step]:
    quick = size == SIZES[0]
    out = f"outputs/{size}"
    steps = [
        Step(
            f"{size}: the plan of stage 1",
            f"python train_sft.py --stage 1 --recipe {size} --dry_run",
            says="Plan of stage 1",
        ),
        Step(
            f"{size}: stage 1",
            f"accelerate launch train_sft.py --stage 1 --recipe {size}",
            SHORT,
            makes=(f"{out}/stage1/config.json", f"{out}/stage1/README.md"),
            quick=quick,
        ),
        Step(
            f"{size}: stage 2",
            f"accelerate launch train_sft.py --stage 2 --recipe {size}",
            SHORT,
            makes=(f"{out}/stage2/config.json", f"{out}/stage2/adapter/adapter_config.json"),
            needs=(f"{size}: stage 1",),
            quick=quick,
        ),
    ]
    configurations = (
        ("A.4", "internvl_chartqa", "traces of InternVL on ChartQA (A.4)", quick),
        ("A.5", "qwen3vl_cocoqa", "captions (A.5)", False),
        ("A.6", "hunyuanocr", "traces of HunyuanOCR on OCR-VQA (A.6)", False),
    )
    for name, config, traces, quick_one in configurations:
        folder = f"{out}/stage3-{config.replace('_', '-')}"
        steps.append(
            Step(
                f"{size}: stage 3, {name}",
                f"accelerate launch train_distill.py --recipe {size} --variant {config}",
                f"{SHORT} {FEW}" if name == "A.5" else SHORT,
                makes=(f"{folder}/config.json", f"{folder}/README.md"),
                needs=(f"{size}: stage 2", traces),
                majors=("5",) if name == "A.6" else ("4", "5"),
                quick=quick_one,
            )
        )
    # transformers 4 has two of the three teachers.
    teachers = f" --teachers {INTERNVL} {QWEN}" if major == "4" else ""
    steps.append(
        Step(
            f"{size}: stage 3, the union",
            f"accelerate launch train_distill.py --recipe {size}{teachers}",
            f"{SHORT} {FEW}",
            makes=(f"{out}/stage3/config.json", f"{out}/stage3/README.md"),
            needs=(f"{size}: stage 2", "traces of InternVL on ChartQA (A.4)", "traces of Qwen3-VL on COCO-QA (A.5)"),
        )
    )
    return steps


def _evaluation(size: str) -> list[Step]:
    out = f"outputs/{size}"
    student = f"{out}/stage3-internvl-chartqa"
    return [
        Step(
            f"{size}: before and after, ChartQA",
            f"python evaluate_vqa.py --model baseline={out}/stage2 --model student={student} "
            "--source HuggingFaceM4/ChartQA --split test --before_after --card",
            f"--rows 4 --max_new_tokens 8 --output {out}/evaluation",
            makes=(f"{student}/before_after.md", f"{out}/evaluation"),
            says="accuracy, percent",
            needs=(f"{size}: stage 3, A.4",),
            quick=size == SIZES[0],
        ),
    ]


def _push(size: str) -> list[Step]:
    folder = f"outputs/{size}/stage3-internvl-chartqa"
    return [
        Step(
            f"{size}: push",
            f"python -m siq_vl.hub {folder} --repo_id rehearsal/{size}-chartqa --revision main",
            says=f"/rehearsal/{size}-chartqa/commit/",
            needs=(f"{size}: stage 3, A.4",),
            quick=size == SIZES[0],
        ),
        Step(
            f"{size}: a stranger asks what was pushed",
            f"python ask.py docs/example.png What? --model rehearsal/{size}-chartqa --max_new_tokens 8",
            says="answer: ",
            needs=(f"{size}: push",),
            quick=size == SIZES[0],
        ),
    ]


def script_of(command: str, repo: Path) -> list[str]:
    """Return the script that a command runs, below the repository, and its arguments.

    `python` and `accelerate launch` are left out: they are the runner's part. `hf` is run as the module that it is.
    """
    words = command.split()
    if words[0] == "hf":
        return ["-m", "huggingface_hub.cli.hf", *words[1:]]
    while words[0] in ("python", "accelerate", "launch"):
        words = words[1:]
    if words[0] == "-m":
        return words
    return [str(repo / words[0]), *words[1:]]
