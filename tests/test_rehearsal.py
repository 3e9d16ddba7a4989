"""The real path, rehearsed in its quick form, and what is said where an id is not what it was expected to be."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from rehearsal.data import FINEVISION, LLAVA_FILE, ROWS, chartqa, write_coco, write_llava, write_table
from rehearsal.server import Repo, repos_of
from rehearsal.steps import all_steps, quick_steps
from rehearsal.walk import Walk, table
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.planning.real_run import Card, stage_cost
from siq_vl.terms import inherited, known_ids, licence_for, made_from, terms_of, warnings_of
from siq_vl.training.arguments import DataArguments
from siq_vl.training.recipes import parse_recipe

REPO_ROOT = Path(__file__).resolve().parent.parent
MAJOR = importlib.metadata.version("transformers").split(".")[0]
ONE_FILE = {"default": {"train": ("data/train-00000-of-00001.parquet",)}}
STUDENT = "outputs/siq-vl-0.5b/stage3-internvl-chartqa"


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A Hub of miniatures, and a process that has loaded the libraries against it, its caches empty."""
    begun = Walk(tmp_path_factory.mktemp("rehearsal"), quick_steps(MAJOR), forked=True)
    yield begun
    begun.close()


@pytest.fixture(scope="module")
def walked(walk):
    """The same, the quick form walked through."""
    walk.take_all()
    return walk


def test_the_quick_form_of_the_real_path_is_walked(walked):
    taken = [walked.done[step.name] for step in walked.steps]
    assert all(step.ok for step in taken), table(taken)
    assert {"stage 1", "stage 2", "stage 3, A.4", "push"} <= {step.name.rpartition(": ")[2] for step in taken}
    assert not walked.hub.unknown


def test_a_second_walk_does_nothing_again(walked):
    before = len(walked.hub.asked)
    assert all(step.ok for step in walked.take_all()) and len(walked.hub.asked) == before


def test_everything_came_from_this_hub_alone(walked):
    """Weights, configurations, rows and pictures were asked of it, and large files of the address it redirects to."""
    asked = "\n".join(walked.hub.asked)
    for name in ("siglip2-large-patch16-512", "Qwen2.5-0.5B-Instruct", "InternVL3_5-2B-HF", "FineVision", "ChartQA"):
        assert re.search(rf"GET .*{name}/resolve/", asked), name
    assert "GET /blobs/" in asked and "PUT /uploads/" in asked


def test_the_card_names_what_the_whole_chain_was_made_from(walked):
    card = (walked.work / STUDENT / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "cc-by-nc-sa-4.0"
    assert {"HuggingFaceM4/FineVision", "derek-thomas/ScienceQA", "HuggingFaceM4/ChartQA"} <= {*metadata["datasets"]}
    for name in (
        "FineVision/sharegpt4v(knowledge)",
        "derek-thomas/ScienceQA",
        "InternVL3_5-2B-HF",
        "HuggingFaceM4/ChartQA",
    ):
        assert name in card, name
    # Pushed after it was evaluated, it still holds what was measured.
    pushed = walked.hub.repos["models", "rehearsal/siq-vl-0.5b-chartqa"].branches["main"]
    assert b"## Before and after" in pushed["README.md"] and b"| accuracy, percent" in pushed["README.md"]


def test_the_licence_of_a_stage_is_in_its_settings(walked):
    names = inherited(walked.work / STUDENT)
    settings = json.loads((walked.work / STUDENT / "training_settings.json").read_text())
    assert settings["made_from"] == names and "lmms-lab/textvqa" in names


def run(walk: Walk, command: str) -> tuple[int, str]:
    """Run a command against the rehearsal's Hub; return its exit status and the last line that it prints."""
    log = walk.logs / "one.txt"
    log.unlink(missing_ok=True)
    rc, _, _ = walk.runner.run(command, walk.work, log)
    return rc, log.read_text().strip().splitlines()[-1]


def add_data(walk: Walk, name: str, renamed: dict[str, str], card_lags: bool = False) -> None:
    """Put a copy of ChartQA on the Hub whose columns have other names, with its card or without it."""
    folder = walk.folder / "more"
    path = folder / "datasets" / "rehearsal" / name
    write_table(path, chartqa, None, ONE_FILE, 4, {} if card_lags else renamed)
    if card_lags:
        file = path / "data" / "train-00000-of-00001.parquet"
        Dataset.from_parquet(str(file)).rename_columns(renamed).to_parquet(file)
    walk.hub.reload(folder)


EVALUATE = f"python evaluate_vqa.py --model root={REPO_ROOT} --rows 2 --output nowhere --source"


def test_a_column_that_was_renamed_is_named_with_those_that_are_there(walk):
    add_data(walk, "renamed", {"label": "solution"})
    rc, said = run(walk, f"{EVALUATE} rehearsal/renamed --split train")
    assert rc == 1 and said.startswith("error: source rehearsal/renamed: the columns image, query, solution")
    assert "chartqa comes nearest, which has label and query, and label is not there; set `format`" in said


def test_files_that_differ_from_their_card_are_told_with_both(walk):
    add_data(walk, "lagging", {"label": "solution"}, card_lags=True)
    rc, said = run(walk, f"{EVALUATE} rehearsal/lagging --split train")
    assert rc == 1 and "split 'train' cannot be read from the Hub" in said
    assert "solution" in said and "label" in said and "laid out otherwise than its card says" in said


def test_a_split_that_is_not_there_is_named_with_those_that_are(walk):
    rc, said = run(walk, f"{EVALUATE} HuggingFaceM4/ChartQA --split validation")
    assert rc == 1 and "error: HuggingFaceM4/ChartQA, split 'validation' cannot be read from the Hub" in said
    assert "'train', 'val', 'test'" in said and "set `split` to one of these" in said


def test_a_configuration_that_is_not_there_is_named_with_those_that_are(walk):
    rc, said = run(walk, f"{EVALUATE} HuggingFaceM4/FineVision --subset chartqas --split train")
    assert rc == 1 and "configuration 'chartqas'" in said and "'sharegpt4v(coco)'" in said
    assert "set `subset` to one of these" in said


def test_a_gated_id_says_where_to_ask_for_access(walk):
    add_data(walk, "gated", {})
    folder = walk.folder / "more" / "models" / "rehearsal" / "gated-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    walk.hub.reload(walk.folder / "more")
    walk.hub.gated |= {"rehearsal/gated", "rehearsal/gated-model"}
    rc, said = run(walk, f"{EVALUATE} rehearsal/gated --split train")
    assert rc == 1 and "rehearsal/gated, split 'train' cannot be read from the Hub" in said
    assert "ask for access on the page datasets/rehearsal/gated of the Hub, then log in with `hf auth login`" in said
    command = "python train_sft.py --stage 1 --recipe siq-vl-0.5b --language_model rehearsal/gated-model --max_steps 1"
    rc, said = run(walk, f"{command} --output_dir gated")
    assert rc == 1 and said.startswith(
        "error: google/siglip2-large-patch16-512 or rehearsal/gated-model cannot be loaded"
    )
    assert "ask for access" in said


def test_a_download_that_breaks_off_says_that_the_command_can_be_run_again(walk):
    walk.hub.cut = ("sharegpt4v(sam)",)
    rc, said = run(walk, f"{EVALUATE} HuggingFaceM4/FineVision --subset sharegpt4v(sam) --split train")
    assert rc == 1 and "configuration 'sharegpt4v(sam)', split 'train' cannot be read from the Hub" in said
    assert "run the same command again" in said
    walk.hub.cut = ()
    rc, said = run(
        walk, f"{EVALUATE} HuggingFaceM4/FineVision --subset sharegpt4v(sam) --split train --max_new_tokens 2"
    )
    assert rc == 0, said


def test_an_id_that_does_not_exist_is_told_with_what_to_check(walk):
    rc, said = run(walk, f"{EVALUATE} rehearsal/nothing --split train")
    assert rc == 1 and "rehearsal/nothing, split 'train' cannot be read" in said and "check the id" in said


def test_the_plan_reads_the_sizes_off_the_card_and_warns_of_many_passes(walk):
    log = walk.logs / "plan.txt"
    rc, _, _ = walk.runner.run("python train_sft.py --stage 1 --recipe siq-vl-0.5b --dry_run", walk.work, log)
    printed = log.read_text()
    assert rc == 0
    times = 128_000 / ROWS
    name = "HuggingFaceM4/FineVision/sharegpt4v(knowledge)"
    assert f"WARNING: each row of {name} is read {times:.1f} times: add sources, or lower max_steps" in printed
    assert "the card will say: cc-by-nc-4.0" in printed and "no commercial use" in printed
    # Nothing of the data set was downloaded for it but what it takes to look at some rows.
    assert "texts are counted where the data can be read" not in printed


# What needs no process of its own.


def test_every_command_of_the_walk_is_of_an_id_that_the_hub_holds():
    held = {*FINEVISION, *known_ids()}
    for step in all_steps(MAJOR):
        for word in step.command.split():
            if (
                re.fullmatch(r"(Qwen|OpenGVLab|tencent|HuggingFaceM4|lmms-lab|derek-thomas)/\S+", word)
                and not step.refuses
            ):
                assert word in held, word


def test_every_id_of_the_recipes_has_its_terms():
    for path in sorted((REPO_ROOT / "recipes").glob("siq-vl-*/*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        named = [recipe.get("vision_tower"), recipe.get("language_model"), *recipe.get("teachers", [])]
        named += ["/".join(filter(None, (each["path"], each.get("subset")))) for each in recipe.get("sources", [])]
        for name in filter(None, named):
            assert terms_of(name).known, f"{path.name}: {name}"


def test_the_reports_a5_trains_the_attention_projections_alone():
    for size in ("siq-vl-0.5b", "siq-vl-1.5b"):
        recipe = parse_recipe(("3",), ["--recipe", size, "--variant", "qwen3vl_cocoqa"])
        assert recipe.model.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert recipe.traces.teachers == ["Qwen/Qwen3-VL-2B-Instruct"]


def test_coco_by_hand_is_read_as_its_authors_published_it(tmp_path):
    write_llava(tmp_path, 4)
    write_coco(tmp_path / "coco" / "train2017", 4)
    config = SourceConfig(path=str(tmp_path / LLAVA_FILE), image_folder=str(tmp_path / "coco" / "train2017"))
    mixture = build_mixture(DataArguments(sources=[config]), "answer", 4)
    assert all(row["images"][0].size[0] >= 96 for row in mixture.rows)


def test_a_mixture_that_repeats_its_rows_often_says_so(tmp_path, caplog):
    write_llava(tmp_path, 4)
    write_coco(tmp_path, 4)
    data = DataArguments(sources=[SourceConfig(path=str(tmp_path / LLAVA_FILE))])
    caplog.set_level("WARNING")
    assert build_mixture(data, "answer", 16).report.passes() == {LLAVA_FILE: 4.0}
    assert "times" not in caplog.text
    build_mixture(data, "answer", 18)
    assert f"each row of {LLAVA_FILE} is read 4.5 times: add sources, or lower max_steps" in caplog.text


def test_the_whole_run_is_counted_from_recipes_and_published_sizes():
    cost = stage_cost(parse_recipe(("1",), ["--recipe", "siq-vl-0.5b", "--stage", "1"]), "1", Card(100, 1000, 0.5))
    assert (cost.rows, cost.draws, cost.image) == (1988, 128_000, 256)
    # The language model's three passes over every token; each picture once, since features of so few are stored.
    flops = 6 * 494_032_768 * cost.tokens + 2 * 1988 * 1024 * 304_147_456
    assert cost.hours == pytest.approx(flops / 50e12 / 3600)


@pytest.mark.parametrize(
    ("names", "licence"),
    [
        ([], "apache-2.0"),
        (["Qwen/Qwen2.5-0.5B-Instruct", "lmms-lab/textvqa"], "apache-2.0"),
        (["HuggingFaceM4/ChartQA"], "gpl-3.0"),
        (["HuggingFaceM4/ChartQA", "HuggingFaceM4/FineVision/sharegpt4v(coco)"], "cc-by-nc-4.0"),
        (["derek-thomas/ScienceQA", "HuggingFaceM4/FineVision/sharegpt4v(coco)"], "cc-by-nc-sa-4.0"),
        (["tencent/HunyuanOCR"], "other"),
        (["derek-thomas/ScienceQA", "tencent/HunyuanOCR"], "other"),
        (["HuggingFaceM4/FineVision/cocoqa"], "other"),
        (["HuggingFaceM4/FineVision/cocoqa", "HuggingFaceM4/FineVision/sharegpt4v(coco)"], "other"),
        (["somebody/something"], "other"),
    ],
)
def test_the_narrowest_licence_counts(names, licence):
    assert licence_for(names) == licence


def test_terms_that_bind_are_told_before_anything_is_spent():
    (line,) = warnings_of(["tencent/HunyuanOCR", "Qwen/Qwen3-VL-2B-Instruct"])
    assert "no training on outputs" in line and line.startswith("tencent/HunyuanOCR: licence other")


def test_what_a_checkpoint_was_made_from_leaves_out_this_machines_folders():
    settings = {
        "backbones": {"vision_tower": "backbones/siglip2-tiny", "language_model": "Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {"sources": [{"path": "figures"}, {"path": "/data/mine.jsonl"}, {"path": "a/b", "subset": "c"}]},
        "made_from": ["d/e"],
    }
    assert made_from(settings) == ["Qwen/Qwen2.5-0.5B-Instruct", "a/b/c", "d/e"]


def test_a_commit_changes_with_its_files():
    repo = Repo("a/b", "models", {"x": b"1"})
    first = repo.commit("main")
    repo.branches["main"]["x"] = b"2"
    assert repo.commit("main") != first and repo.branch(first) is None and repo.branch("main") == "main"


def test_a_folder_without_repositories_is_an_empty_hub(tmp_path):
    assert repos_of(tmp_path) == {}
