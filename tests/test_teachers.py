"""Teachers: tiny models of the real classes, servers that work and servers that fail, keys, budgets, and killed runs."""

import asyncio
import io
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import tiny_teachers
from chat_server import FAULTS, sent_picture, serving
from PIL import Image
from processes import CONTEXT

from siq_vl.distill.budget import Budget, BudgetLimits
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import TraceQuestion, figure_questions
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.store_page import write_page
from siq_vl.distill.teachers.base import TeacherLost, TeacherRequest
from siq_vl.distill.teachers.local import TransformersTeacher
from siq_vl.distill.teachers.models import defaults_for
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher, _read_completion
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.verification import Verification

REPO_ROOT = Path(__file__).resolve().parent.parent
RULES = Verification()


def sums(count: int) -> list[TraceQuestion]:
    """Questions that `chat_server` answers."""
    return [TraceQuestion(f"sum-{a}", f"How much is {a} + {a % 7}?", (str(a + a % 7),), "number") for a in range(count)]


def server_teacher(url: str | list[str], **settings) -> ServerTeacher:
    settings = {"backoff": 0.001, "timeout": 2.0, "in_flight": 16, "sampling": {"max_tokens": 64}, **settings}
    sampling = settings.pop("sampling")
    return ServerTeacher("adder", ServerSettings([url] if isinstance(url, str) else url, **settings), sampling=sampling)


def ask(folder: Path, teacher, questions, **options):
    with TraceStore(folder) as store:
        record_rules(store, RULES)
        progress = Run(teacher, Prompts(), store, RULES, progress=False, **options).over(questions)
        update_verdicts(store, RULES, Selection())
    return progress


def rows_of(folder: Path) -> list[dict]:
    return read_traces(folder, kept=False).remove_columns("images").to_list()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny teachers, by model type."""
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in tiny_teachers.BUILDERS.items()}


@pytest.mark.parametrize("name", tiny_teachers.BUILDERS)
def test_real_classes_really_run(name, tiny, tmp_path):
    teacher = TransformersTeacher(str(tiny[name]), max_new_tokens=8, batch_size=3, name=name)
    assert type(teacher._model).__name__.casefold() == name.replace("_", "") + "forconditionalgeneration"
    progress = ask(tmp_path, teacher, figure_questions(4))
    rows = rows_of(tmp_path)
    assert progress.made == len(rows) == 4
    assert {row["teacher"] for row in rows} == {name}
    assert all(0 <= row["completion_tokens"] <= 8 and row["prompt_tokens"] > 8 for row in rows)
    assert all(row["rejected_by"] for row in rows)  # random weights know nothing
    settings = json.loads(rows[0]["sampling"])
    assert settings["max_new_tokens"] == 8 and settings["do_sample"] is False


@pytest.mark.parametrize("name", tiny_teachers.BUILDERS)
def test_batched_replies_equal_single_ones_and_see_the_picture(name, tiny):
    teacher = TransformersTeacher(str(tiny[name]), max_new_tokens=8)
    questions = list(figure_questions(3))
    asked = [TeacherRequest(question, question.pictures(), question.question) for question in questions]
    together = [said.text for said in teacher._generate(asked)]
    assert together == [teacher._generate([one])[0].text for one in asked]
    others = [
        TeacherRequest(one.question, other.pictures, one.prompt)
        for one, other in zip(asked, asked[1:] + asked[:1], strict=True)
    ]
    assert together != [said.text for said in teacher._generate(others)]


def test_a_sampled_reply_hangs_on_its_seed_and_its_repeat(tiny):
    question = next(figure_questions(1))
    asked = [TeacherRequest(question, question.pictures(), "?", repeat) for repeat in range(2)]

    def replies(seed: int) -> list[str]:
        sampling = {"do_sample": True, "temperature": 1.5}
        teacher = TransformersTeacher(str(tiny["internvl"]), sampling=sampling, max_new_tokens=12, seed=seed)
        return [teacher._generate([one])[0].text for one in asked]

    assert replies(0) == replies(0)
    assert replies(0) != replies(1)
    assert len(set(replies(0))) == 2


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("Qwen/Qwen3-VL-2B-Thinking", "qwen3_vl_thinking"),
        ("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl_instruct"),
        ("OpenGVLab/InternVL3_5-2B-HF", "internvl3_5"),
        ("tencent/HunyuanOCR", "hunyuan_ocr"),
        ("someone/else", "default"),
    ],
)
def test_ready_settings(model, family):
    settings = defaults_for(model)
    assert settings.prompts == family
    assert Prompts(settings.prompts).versions
    assert "do_sample" in settings.sampling


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no processor that can be loaded"):
        TransformersTeacher(str(tmp_path))


@pytest.mark.skipif(
    not tiny_teachers.V5, reason="transformers 4 has no HunYuanVL, and its server serves no pictures so"
)
def test_transformers_serve_answers_as_the_model_does(tiny, tmp_path):
    """The same weights behind transformers' own server and on this device give the same text."""
    folder = str(tiny["hunyuan_vl"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/v1"
        settings = ServerSettings([url], in_flight=2, timeout=120)
        served = ask(
            tmp_path / "served", ServerTeacher(folder, settings, sampling={"max_tokens": 8}), figure_questions(3)
        )
        assert (served.made, served.failed) == (3, 0)
    finally:
        server.terminate()
        server.wait()
    ask(tmp_path / "local", TransformersTeacher(folder, max_new_tokens=8, batch_size=1), figure_questions(3))
    outputs = [{row["sample_id"]: row["output"] for row in rows_of(tmp_path / name)} for name in ("served", "local")]
    assert outputs[0] == outputs[1]
    assert all(outputs[0].values())


def test_the_server_gets_the_picture_the_prompt_and_the_settings(tmp_path):
    question = next(figure_questions(1))
    with serving() as (server, url):
        server.keep_bodies = True
        ask(
            tmp_path,
            server_teacher(url, sampling={"max_tokens": 9, "temperature": 0.5, "seed": 3}),
            [question],
            samples=2,
        )
    assert [body["seed"] for body in server.seen] == [3, 4]
    body = server.seen[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("adder", 9, 0.5)
    assert body["messages"][0]["content"][1]["text"] == Prompts().render(question)
    assert sent_picture(body) == question.pictures()[0].data
    assert Image.open(io.BytesIO(sent_picture(body))).size == question.drawn.image.size


def test_a_failing_server_leaves_every_question_with_one_verdict(tmp_path):
    with serving(latency=0.005, faults=0.2) as (server, url):
        progress = ask(tmp_path, server_teacher(url, timeout=1.0, in_flight=64), sums(1000))
    assert all(server.counts[fault] for fault in FAULTS)
    rows = rows_of(tmp_path)
    assert progress.made == len(rows) == len({row["sample_id"] for row in rows}) == 1000
    for row in rows:
        assert (row["verdict"] == "kept") == (not row["error"]), row
        assert row["error"] or row["answer"] == row["golds"][0]
    assert sum(row["attempts"] for row in rows) >= server.counts["requests"]
    assert sum(bool(row["error"]) for row in rows) <= 5


def run_command(arguments: list[str], log: str) -> None:
    """Run `generate_traces.py` in this process, which a test has just made."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    sys.argv = ["generate_traces.py", *arguments]
    runpy.run_path(str(REPO_ROOT / "generate_traces.py"), run_name="__main__")


@pytest.fixture
def start_command():
    """Starts `generate_traces.py` in a process of its own, forked from one that has the libraries loaded already."""

    def start(log: Path, *arguments: str):
        process = CONTEXT.Process(target=run_command, args=([str(argument) for argument in arguments], str(log)))
        process.start()
        return process

    return start


def write_questions(path: Path, questions: list[TraceQuestion]) -> Path:
    rows = ({"id": q.id, "question": q.question, "answer": q.golds[0], "kind": q.kind} for q in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_three_kills_lose_at_most_what_is_in_flight_and_write_nothing_twice(tmp_path, start_command):
    in_flight, store = 16, tmp_path / "store"
    questions = write_questions(tmp_path / "sums.jsonl", sums(1000))
    with serving(latency=0.02, faults=0.2) as (server, url):
        command = [
            "--teacher", "openai", "--model", "adder", "--base_url", url, "--questions", questions, "--output", store,
            "--in_flight", in_flight, "--timeout", 2, "--backoff", 0.01, "--attempts", 12,
        ]  # fmt: skip
        for stop_at in (150, 400, 700):
            running = start_command(tmp_path / "log", *command)
            while server.counts["answered"] < stop_at:
                assert running.is_alive(), (tmp_path / "log").read_text()
                time.sleep(0.005)
            running.kill()
            running.join()
            assert running.exitcode == -signal.SIGKILL
        last = start_command(tmp_path / "log", *command)
        last.join()
        assert last.exitcode == 0, (tmp_path / "log").read_text()
        answered = server.counts["answered"]
    rows = rows_of(store)
    assert len(rows) == len({row["trace_id"] for row in rows}) == len({row["sample_id"] for row in rows}) == 1000
    assert all(row["verdict"] == "kept" and row["answer"] == row["golds"][0] for row in rows)
    assert 1000 <= answered <= 1000 + 3 * in_flight
    assert not list((store / "journal").glob("*.jsonl")) and not list((store / "data").glob(".*"))


def test_an_interrupted_run_keeps_what_is_under_way_and_goes_on(tmp_path, start_command):
    store = tmp_path / "store"
    questions = write_questions(tmp_path / "sums.jsonl", sums(200))
    with serving(latency=0.1, slots=8) as (server, url):
        command = [
            "--teacher", "openai", "--model", "adder", "--base_url", url, "--questions", questions, "--output", store,
            "--in_flight", 8,
        ]  # fmt: skip
        running = start_command(tmp_path / "log", *command)
        while server.counts["answered"] < 20:
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGINT)
        running.join()
        said = (tmp_path / "log").read_text()
        assert running.exitcode == 130, said
        assert "Traceback" not in said
        assert "what is under way is waited for" in said
        rows = rows_of(store)
        assert 20 <= len(rows) == server.counts["answered"] < 200
        assert not any(row["error"] for row in rows)
        finishing = start_command(tmp_path / "log", *command)
        finishing.join()
        assert finishing.exitcode == 0
        assert len(rows_of(store)) == server.counts["answered"] == 200


def test_several_servers_share_the_work_and_stand_in_for_each_other(tmp_path):
    with serving(latency=0.002) as (first, one), serving(latency=0.002) as (second, two):
        ask(tmp_path / "both", server_teacher([one, two]), sums(200))
        assert min(first.counts["answered"], second.counts["answered"]) > 50
    with serving(latency=0.002) as (alive, url), socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        progress = ask(tmp_path / "one", server_teacher([dead, url]), sums(100))
    assert (progress.made, progress.failed, alive.counts["answered"]) == (100, 0, 100)


def test_without_a_server_the_run_stops_and_records_nothing(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        teacher = server_teacher(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", in_flight=4)
        with pytest.raises(TeacherLost, match="attempts in a row have failed: see that the server is up"):
            ask(tmp_path, teacher, sums(100))
    with pytest.raises(ValueError, match="holds no traces"):
        read_traces(tmp_path, kept=False)


def test_failed_questions_are_asked_again_when_told_to(tmp_path):
    with serving(faults=1.0) as (_, url):
        teacher = server_teacher(url, attempts=1, timeout=0.2, in_flight=2)
        assert ask(tmp_path, teacher, sums(3)).failed == 3
    with serving() as (server, url):
        assert ask(tmp_path, server_teacher(url), sums(3)).made == 0
        with TraceStore(tmp_path) as store:
            assert store.drop_failed() == 3
        assert ask(tmp_path, server_teacher(url), sums(3)).made == 3
    rows = rows_of(tmp_path)
    assert len(rows) == 3
    assert not any(row["error"] for row in rows)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:secret@host/v1", "carries a user, password or query"),
        ("http://host/v1?api_key=secret", "carries a user, password or query"),
        ("host:8000", "it must look like http://host:8000/v1"),
        ("file:///etc/passwd", "it must look like"),
    ],
)
def test_bad_base_urls_are_refused_without_repeating_their_secrets(url, message):
    with pytest.raises(ValueError, match=message) as refused:
        ServerSettings([url])
    assert "secret" not in str(refused.value)


def test_the_key_is_sent_and_appears_nowhere(tmp_path, monkeypatch, caplog, capsys):
    key = "sk-test-0123456789abcdef"
    caplog.set_level(logging.DEBUG)
    with serving(key=key) as (server, url):
        with pytest.raises(TeacherLost, match=r"refuses the key \(status 401\)"):
            ask(tmp_path / "without", server_teacher(url), sums(5))
        monkeypatch.setenv("MY_KEY", "sk-wrong-0123456789")
        with pytest.raises(TeacherLost) as refused:  # this server repeats the key that it refuses
            ask(tmp_path / "wrong", server_teacher(url, api_key_env="MY_KEY"), sums(5))
        assert "sk-" not in str(refused.value)
        monkeypatch.setenv("MY_KEY", key)
        progress = ask(tmp_path / "right", server_teacher(url, api_key_env="MY_KEY"), sums(5))
    assert (progress.made, progress.failed, server.counts["answered"]) == (5, 0, 5)
    page = write_page(tmp_path / "right")
    written = capsys.readouterr()
    places = [
        caplog.text,
        written.out,
        written.err,
        *(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()),
    ]
    assert page.exists() and len(places) > 5
    assert not any(key in text or "sk-wrong" in text for text in places)
    teacher = server_teacher(url, api_key_env="MY_KEY")
    assert teacher._redacted(f"Bearer {key} and sk-0123456789abc") == "[key] and [key]"


def test_a_budget_of_tokens_is_spent_and_never_overdrawn(tmp_path):
    with serving(latency=0.002) as (_, url):

        def budgeted(folder: str, tokens: int):
            budget = Budget(BudgetLimits(tokens), max_new_tokens=64)
            with TraceStore(tmp_path / folder) as store:
                budget.carry_over(store.spent("adder"))
            return budget, ask(tmp_path / folder, server_teacher(url), sums(300), budget=budget)

        budget, progress = budgeted("store", 3000)
        spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows_of(tmp_path / "store"))
        assert progress.ended == "budget"
        assert 0 < progress.made < 300
        assert spent == budget.spent_in + budget.spent_out
        assert 3000 - 2 * (64 + 1024) <= spent <= 3000
        again, progress = budgeted("store", 3000)  # what was spent before counts
        assert progress.made <= 3000 // 20
        assert again.spent_in + again.spent_out <= 3000
        _, progress = budgeted("store", 0)
        assert progress.ended == "done"
        assert len(rows_of(tmp_path / "store")) == 300


def test_a_budget_of_money_counts_reading_and_writing_apart():
    async def spend() -> int:
        budget, count = Budget(BudgetLimits(max_cost=1.0, price_in=100.0, price_out=1000.0), max_new_tokens=500), 0
        while await budget.reserve():
            budget.count(1000, 400)
            await budget.release()
            count += 1
        assert budget.spent_money == pytest.approx(count * 0.5)
        return count

    # The first takes 0.1 + 0.4; a second could take 0.1 + 0.5 and no longer fits.
    assert asyncio.run(spend()) == 1


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "a"}, "a"),
        ({"content": "<answer>a</answer>", "reasoning_content": "b"}, "<think>b</think><answer>a</answer>"),
        ({"content": "a", "reasoning": "b"}, "<think>b</think>a"),
        ({"content": None, "reasoning_content": None}, ""),
    ],
)
def test_servers_reasoning_fields_are_read(message, text):
    assert _read_completion(json.dumps({"choices": [{"message": message}]}).encode()).text == text
