"""Ablations: intervals over seeds and questions, the harness on arms that only pretend to train, the shipped plan."""

import json
import os
import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from siq_vl.ablation.arms import jobs_of, read_plan
from siq_vl.ablation.comparison import mean_over_seeds
from siq_vl.ablation.jobs import Job, Jobs
from siq_vl.data.figures.dataset import sample
from siq_vl.evaluation.emergence_figure import read_emergence
from siq_vl.evaluation.held_out import described, held_out_items
from siq_vl.evaluation.statistics import ratio_of_totals

REPO_ROOT = Path(__file__).resolve().parent.parent
SHIPPED = REPO_ROOT / "recipes/tiny/ablations.yaml"


def test_one_seed_has_the_t_interval_of_paired_questions():
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 50)), rng.random((1, 50))
    found = ratio_of_totals(first) - ratio_of_totals(second)
    expected = stats.ttest_rel(first[0], second[0]).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_questions_that_all_go_alike_leave_the_t_interval_of_the_seeds():
    by_seed = np.array([0.2, 0.5, 0.6])
    found = ratio_of_totals(np.repeat(by_seed[:, None], 40, axis=1))
    expected = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.by_seed == pytest.approx(by_seed)


@pytest.mark.parametrize("spread", [(0.0, 0.5, 0.5), (0.05, 0.4, 0.3), (0.5, 0.1, 0.1)])
def test_intervals_of_three_seeds_cover_the_truth_as_often_as_they_say(spread):
    rng = np.random.default_rng(1)
    of_seeds, of_questions, rest = spread
    covered = 0
    for _ in range(1000):
        answers = (
            of_seeds * rng.normal(size=(3, 1)) + of_questions * rng.normal(size=100) + rest * rng.normal(size=(3, 100))
        )
        low, high = ratio_of_totals(answers).interval
        covered += low <= 0 <= high
    assert 0.92 <= covered / 1000 <= 0.98


def test_a_ratio_has_the_interval_that_a_bootstrap_over_questions_gives():
    rng = np.random.default_rng(2)
    stated = rng.integers(0, 6, (1, 400))
    contradicted = rng.binomial(stated, 0.2)
    found = ratio_of_totals(contradicted, stated)
    assert found.value == contradicted.sum() / stated.sum()
    drawn = rng.integers(0, 400, (4000, 400))
    ratios = contradicted[0][drawn].sum(1) / stated[0][drawn].sum(1)
    assert found.half_width == pytest.approx(1.96 * ratios.std(), rel=0.06)
    assert ratio_of_totals(np.zeros((1, 2)), np.zeros((1, 2))) is None


def test_differences_are_paired():
    rng = np.random.default_rng(3)
    shared = rng.random((3, 200))
    better = ratio_of_totals(shared + 0.1)
    assert (better - ratio_of_totals(shared)).half_width == pytest.approx(0)
    assert (better - ratio_of_totals(shared)).value == pytest.approx(0.1)
    assert (better - ratio_of_totals(shared[:1])).influence.shape == (3, 200)
    with pytest.raises(ValueError, match="no paired difference"):
        better - ratio_of_totals(shared[:2])
    with pytest.raises(ValueError, match="two questions or more"):
        ratio_of_totals(np.ones((3, 1)))


TRAIN = """
import json, pathlib, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open("calls.txt", "a") as calls:
    calls.write("train " + given["--output_dir"] + "\\n")
if sys.argv[1] == "bad" and not pathlib.Path("mended").exists():
    sys.exit("the tea is cold")
folder = pathlib.Path(given["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
right = {"half": 10, "bad": 10, "all": 20}[sys.argv[1]]
(folder / "model.safetensors").write_text(str(right))
(folder / "training_settings.json").write_text(json.dumps({"seconds": 7.0, "steps": given["--max_steps"]}))
"""
EVALUATE = """
import json, pathlib, sys
given = list(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(dict(given)["--output"])
out.mkdir(parents=True, exist_ok=True)
for flag, value in given:
    if flag == "--model":
        seed, folder = value.split("=")
        with open("calls.txt", "a") as calls:
            calls.write("ask " + folder + "\\n")
        right = int((pathlib.Path(folder) / "model.safetensors").read_text())
        lines = []
        for place in range(20):
            good = place < right
            made = {"id": str(place), "group": "held out", "domain": "charts", "type": "sum", "multi_step": place % 2 == 0}
            made |= {"question": "?", "gold": "1", "output": "<think>a b. c 1</think><answer>1</answer>", "rationale": "a b. c 1"}
            made |= {"answer": "1", "well_formed": True, "correct": good, "stated": 2, "contradicted": int(not good)}
            lines.append(json.dumps(made))
        (out / (seed + ".jsonl")).write_text("\\n".join(lines))
"""
EMERGENCE = (
    "well_formed",
    "length",
    "teacher_length",
    "steps_found",
    "steps_in_order",
    "arithmetic",
    "structure",
    "accuracy",
)


@pytest.fixture
def ablate(tmp_path, monkeypatch, capsys):
    """Runs ablate.py on three arms that pretend to train; returns what it printed and the message it ended with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "ask.py").write_text(EVALUATE)
    (tmp_path / "start").mkdir()
    (tmp_path / "start/model.safetensors").write_text("5")
    plan = {
        "steps": 10,
        "batch": 2,
        "seeds": 2,
        "count": 20,
        "start": "start",
        "prepare": {},
        "stores": {},
        "evaluate": {"answers": "ask.py --count {count}"},
        "arms": {
            "stage2": {"about": "as it is"},
            "half": {"about": "half right", "train": "train.py half", "steps": 1.5},
            "all": {"about": "all right", "train": "train.py all"},
            "bad": {"about": "fails", "train": "train.py bad"},
        },
        "compare": [["all", "half"], ["half", "stage2"], ["bad", "half"]],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))

    def run(*arguments: str) -> tuple[str, str]:
        (tmp_path / "calls.txt").write_text("")
        monkeypatch.setattr(sys, "argv", ["ablate.py", "--plan", "plan.yaml", "--output", "out", *arguments])
        try:
            runpy.run_path(str(REPO_ROOT / "ablate.py"), run_name="__main__")
            ended = ""
        except SystemExit as error:
            ended = str(error.code)
        return capsys.readouterr().out, ended

    return run


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


def test_every_arm_is_run_and_its_numbers_are_those_of_its_answers(ablate):
    printed, ended = ablate("--only", "stage2", "half", "all")
    assert not ended
    results = json.loads(Path("out/results.json").read_text())
    accuracy = {arm: result["measures"]["accuracy"]["value"] for arm, result in results["arms"].items()}
    assert accuracy == {"stage2": 0.25, "half": 0.5, "all": 1.0}
    half = results["arms"]["half"]
    assert (half["steps"], half["seconds"]) == (15, [7.0, 7.0])
    assert half["measures"]["hallucination"]["value"] == pytest.approx(10 / 40)
    assert half["measures"]["accuracy"]["by_seed"] == [0.5, 0.5]
    (pair,) = [found for found in results["differences"] if found["first"] == "all"]
    assert pair["measures"]["accuracy"]["value"] == pytest.approx(0.5)
    low, high = stats.ttest_1samp([0.0] * 10 + [1.0] * 10, 0).confidence_interval(0.95)
    assert (pair["measures"]["accuracy"]["low"], pair["measures"]["accuracy"]["high"]) == pytest.approx((low, high))
    assert re.search(r"\| all +\| 2 +\| 10 +\| 7 +\| 100.0 +\|", printed)
    assert Path("out/ablations.md").read_text().strip() in printed
    assert Path("out/ablations.svg").read_text().count('id="value') == 9  # three arms, three measures


def test_how_reasoning_emerged_is_drawn_as_the_mean_over_the_seeds(ablate):
    for seed, accuracy in ((1, 0.2), (2, 0.4)):
        folder = Path(f"out/all/seed{seed}")
        folder.mkdir(parents=True)
        steps = (0, 5, 10) if seed == 1 else (0, 10)
        entries = [{"step": step, **dict.fromkeys(EMERGENCE, accuracy + step)} for step in steps]
        (folder / "emergence.jsonl").write_text("\n".join(map(json.dumps, entries)))
    entries = mean_over_seeds([read_emergence(Path(f"out/all/seed{seed}")) for seed in (1, 2)])
    assert [entry["step"] for entry in entries] == [0, 10]
    assert [entry["accuracy"] for entry in entries] == pytest.approx([0.3, 10.3])
    ablate("--only", "half", "all")
    drawn = Path("out/emergence.svg").read_text()
    assert "all" in drawn and "half" not in drawn


def test_what_is_done_is_not_done_again_and_what_changes_is(ablate):
    arms = ("--only", "stage2", "half")
    ablate(*arms)
    assert len(calls()) == 5  # two trained, two of them and the start asked
    ablate(*arms)
    assert calls() == []
    ablate(*arms, "--steps", "20")
    assert sorted(calls()) == ["train out/half/seed1", "train out/half/seed2"]  # the same weights came of it
    Path("start/model.safetensors").write_text("6")
    ablate(*arms, "--steps", "20")
    assert len(calls()) == 3
    Path("out/half/seed2/model.safetensors").unlink()
    ablate(*arms, "--steps", "20")
    assert calls() == ["train out/half/seed2"]
    ablate(*arms, "--steps", "20", "--seeds", "3")
    assert [call for call in calls() if call.startswith("train")] == ["train out/half/seed3"]


def test_a_failing_arm_is_named_with_its_last_lines_and_keeps_nobody_else_back(ablate):
    printed, ended = ablate()
    assert "bad/seed1, bad/seed2 failed, and 1 jobs could not start" in ended
    assert "the tea is cold" in printed and "exit status 1; the whole log is out/bad/seed1.log" in printed
    assert list(json.loads(Path("out/results.json").read_text())["arms"]) == ["stage2", "half", "all"]
    Path("mended").touch()
    printed, ended = ablate()
    assert not ended
    assert sorted(calls()) == [f"{done} out/bad/seed{seed}" for done in ("ask", "train") for seed in (1, 2)]
    assert "bad - half" in printed


def test_bad_plans_and_options_end_in_one_line(ablate, tmp_path):
    assert "there is no arm 'nobody'; the arms are stage2" in ablate("--only", "nobody")[1]
    assert "seeds is 0; it must be at least 1" in ablate("--seeds", "0")[1]
    assert "jobs at a time are 0" in ablate("--jobs", "0")[1]
    assert "half right" in ablate("--list")[0]
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    for change, message in (
        ({"arms": {"one": {"abuot": "?"}}}, "arm 'one' has a field 'abuot'"),
        ({"arms": {"one": {"about": "?", "ways": ["sung"]}}}, "arm 'one' is asked in the ways sung"),
        ({"compare": [["all", "none"]]}, "compare names 'none'"),
    ):
        Path("plan.yaml").write_text(yaml.safe_dump({**plan, **change}))
        assert message in ablate()[1]
    assert calls() == []
    Path("plan.yaml").write_text(yaml.safe_dump({**plan, "start": "nowhere"}))
    assert "reads nowhere/model.safetensors, which does not exist" in ablate()[1]
    assert calls() == []  # it is said before the job runs, not after


def test_an_interruption_ends_what_is_running_and_it_does_not_count_as_done(tmp_path):
    (tmp_path / "quick.py").write_text(f"open({str(tmp_path / 'quick')!r}, 'w')")
    slow = f"import os, time; open({str(tmp_path / 'slow')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "slow.py").write_text(slow)

    def tell(line: str) -> None:
        while not (tmp_path / "slow").exists() or not (tmp_path / "slow").read_text():
            pass
        raise KeyboardInterrupt

    both = [Job(name, str(tmp_path / f"{name}.py"), tmp_path / name) for name in ("quick", "slow")]
    jobs = Jobs(both, tmp_path, 2, tell)
    with pytest.raises(KeyboardInterrupt):
        jobs.run()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "slow").read_text()), 0)
    assert (tmp_path / "quick.job.json").exists() and not (tmp_path / "slow.job.json").exists()
    with pytest.raises(ValueError, match="waits for 'nobody'"):
        Jobs([Job("one", "x", tmp_path, after=("nobody",))], tmp_path, 1, tell)


def test_a_described_question_is_what_a_text_only_student_was_trained_on(tmp_path, monkeypatch):
    from siq_vl.distill.trace_arguments import TraceArguments
    from siq_vl.distill.training_rows import training_traces

    command = ["generate_traces.py", "--count", "6", "--style", "terse", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(REPO_ROOT / command[0]), run_name="__main__")
    rows = training_traces(TraceArguments(traces=str(tmp_path), student="text"), seed=0).rows
    drawn = [sample("train", index, seed=3) for index in range(6)]
    items = [replace(held_out_items(5)[0], caption=one.figure.caption, question=one.question.text) for one in drawn]
    asked = [described(item) for item in items]
    assert all(item.open_images() == [] for item in asked)
    key = json.dumps
    assert sorted(key(item.prompt()) for item in asked) == sorted(key(row["messages"][:1]) for row in rows)


def test_every_command_of_the_shipped_plan_is_understood(tmp_path, monkeypatch):
    from siq_vl.distill.options import parse_options
    from siq_vl.training.recipes import parse_recipe

    monkeypatch.chdir(tmp_path)
    plan = read_plan(SHIPPED, steps=7)
    stores, stages = 0, []
    for job in jobs_of(plan, Path("out")):
        script, *arguments = shlex.split(job.command)
        assert (REPO_ROOT / script).exists()
        assert "{" not in job.command
        if script == "generate_traces.py":
            options = parse_options("", arguments)
            stores += options.questions.count >= 7 * 32 and options.store.output == job.makes.parent
        elif script != "evaluate_vqa.py":
            recipe = parse_recipe(("3",) if script == "train_distill.py" else ("1", "2"), arguments)
            stages.append(recipe.stage)
            assert recipe.run.effective_batch_size == plan.batch
            if job.name.startswith("prepare/"):
                assert Path(recipe.training.output_dir) == job.makes.parent
            else:
                assert recipe.training.max_steps == round(7 * plan.arms[job.name.split("/")[0]].steps)
    assert stores == 2
    assert stages.count("3") == plan.seeds * sum("distill" in (arm.train or "") for arm in plan.arms.values())
