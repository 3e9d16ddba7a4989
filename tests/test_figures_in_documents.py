"""Every figure in the README and in docs/ is one that a command wrote into a file.

A document's figures stand in tables and in sentences. A table with a heading of `TABLES` has to be a part of the table
that a file holds; `SENTENCES` are filled in from the files and have to stand in a document, wherever that is. Whatever
digits are left then have to be of a kind that is no measurement: see `NOT_MEASURED`. So a figure without a file fails.

The files are those of `docs/results/`, which know by a checksum whether somebody changed them, and a few that other
commands wrote (`measured`). To change a figure, run the command that is named in its file.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from siq_vl.pretraining.gates import LOOK_UP_FLOOR, LOOK_UP_TYPES, SUM_FLOOR
from siq_vl.results import Rows, by_name, checksum_of_weights, read_results, table_rows, write_results

REPO_ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (REPO_ROOT / "README.md", *sorted((REPO_ROOT / "docs").glob("**/*.md")))

# First cell of a table's header in a document -> the file and the table in it.
TABLES = {
    "questions": ("demo", "accuracy"),
    "caption facts right (300 pictures)": ("demo", "captions"),
    "picture": ("shifts", "shifts"),
    "figure": ("anyres", "anyres"),
    "held-out questions": ("questions", "questions"),
    "arm": ("ablations", "arms"),
    "first - second": ("ablations", "differences"),
    "samples/s against plain TRL": ("training", "training"),
    "model": ("fits", "by card"),
    "question": ("backbones", "gates"),
    "engine": ("engines", "engines"),
    "export": ("exports", "exports"),
    "id": ("real_run", "ids"),
    "recipe": ("real_run", "stages"),
    "asked": ("real_run", "traces"),
    "step, transformers 4": ("rehearsal-4", "walk"),
    "step, transformers 5": ("rehearsal-5", "walk"),
}

# Sentences with figures, filled in by `str.format` from `measured()`: {file[table][row][column]} or {file[figure]}.
SENTENCES = (
    # README, head
    "cut into tiles, as documented, it answers {anyres[anyres][in one tile, all tiles and the thumbnail][accuracy]}%",
    "it answers {shifts[shifts][as drawn][tiny]}% of held-out questions right, and {shifts[shifts][moved by 1 px][tiny]}% when",
    # AnyRes
    "{anyres[anyres][in one tile, all tiles and the thumbnail][right]} of "
    "{anyres[anyres][in one tile, all tiles and the thumbnail][of]} right where the figure fills a tile, and "
    "{anyres[anyres][anywhere, all tiles and the thumbnail][right]} of "
    "{anyres[anyres][anywhere, all tiles and the thumbnail][of]} elsewhere",
    # Memory
    "the prediction is within {memory[largest error in percent]}% of the measured peak",
    # Start-up, checkpointing, generation
    "a first start takes {start-up[pictures inside][first start][us a row]} with pictures in parquet files and "
    "{start-up[pictures named][first start][us a row]} where a JSON file names them, "
    "{start-up[pictures inside][first start][ratio]} and {start-up[pictures named][first start][ratio]} times less than row "
    "by row; the next start {start-up[pictures inside][next start][us a row]} and "
    "{start-up[pictures named][next start][us a row]}.",
    "takes {checkpointing-v5[a step of stage 1][checkpointing as it is][s]} s of one core, "
    "{checkpointing-v5[a step of stage 1][tower without a graph][s]} s where the tower runs without a graph, and "
    "{checkpointing-v5[a step of stage 1][tower hooked and checkpointed][s]} s where it is checkpointed as transformers would",
    "decoding runs at {generation[decoding, batch of 1, 105 tokens of prompt][SiQ-VL][ratio]} times its tokens/s "
    "({generation[decoding, batch of 1, 105 tokens of prompt][SiQ-VL][range of ratios]}), and with models so small that only "
    "overhead is left at {generation-overhead[decoding, batch of 1, 45 tokens of prompt][SiQ-VL][ratio]} times "
    "({generation-overhead[decoding, batch of 1, 45 tokens of prompt][SiQ-VL][range of ratios]})",
    # Ablations
    "from {ablations[differences][short - control][accuracy]} points (`short`) to "
    "{ablations[differences][structured - control][accuracy]} (`structured`)",
    "(`structured`: {ablations[differences][structured - control][multi-step]} against "
    "{ablations[differences][structured - control][single-step]} on single-step ones)",
    "as much on single-step questions ({ablations[differences][text_first - control][single-step]}) as on multi-step ones "
    "({ablations[differences][text_first - control][multi-step]})",
    "the union of three styles is at {ablations[differences][three_teachers - structured][accuracy]} points",
    "(`structured`: {ablations[arms][structured][contradicted facts]}% of stated facts contradicted)",
    "(`short`: {ablations[arms][short][contradicted facts]}%)",
    "unverified traces are at {ablations[differences][unverified - verified][accuracy]} points against verified ones",
    "about captions ({ablations[arms][text_only][shown captions]}%) and badly about pictures "
    "({ablations[arms][text_only][accuracy]}%, below its start)",
    "`structured` is at {ablations[differences][structured - control][direct, single-step]} points on single-step questions",
    "({ablations[differences][structured - stage2][direct, single-step]} against stage 2)",
    "`unverified` at {ablations[differences][unverified - control][direct, single-step]}.",
    "answers {direct[accuracy][all, single-step][stage3]}% of them right without its reasoning, where stage 2 answers "
    "{demo[accuracy][all, single-step][stage2]}% and the control {demo[accuracy][all, single-step][control]}%",
    # Results of recipe tiny
    "trained for {training_settings[seconds]:.0f} seconds (`training_settings.json`)",
    "(multi-step: {demo[accuracy][all, multi-step][stage3]} against {demo[accuracy][all, multi-step][control]} of the control)",
    "({demo[accuracy][new combinations][stage3]} against {demo[accuracy][new combinations][control]})",
    # The questions
    "the {questions[questions][all][n]} ordinary questions are about {questions[questions][all][contents]} distinct contents",
    "For the answers of stage 3 it is {questions[clustered_ratio]:.2f} times",
    "{questions[questions][new combinations][in the tokenizer's text]} of the "
    "{questions[questions][new combinations][contents]} that are evaluated are among those",
    # The backbones
    "a `SiglipVisionModel` of {backbones[tower]:.2f}M parameters",
    "a `Qwen2ForCausalLM` of {backbones[language model]:.1f}M",
    "the tower reads {backbones[cells_read]:.1%} of image cells exactly",
)

# Kept as a run printed them, from before commands wrote files: a document's table is the file. Header -> checksum of cells.
# Other documents may show parts of it.
PRINTED = {
    "questions": "02bc5d7ac861fc06ec0118b90995ec5433be31eeb8aa45da6b81c3cb52a20850",
    "caption facts right (300 pictures)": "db02b6224b92e58f87f3ef3ac3e8bde6aa3ca2912c23f85df183d4f13f13ce52",
    "samples/s against plain TRL": "6ae5c6a630ae6423bc675ac30afa64a09b2a843057f6691a9d82bebef8c5b53d",
}
# Files that commands wrote before they wrote checksums.
WRITTEN = {
    "docs/ablations.md": "efdc8d70d2f3d23513861d5b0b0a74686cf9e135ae9a20d00a006b38de8d7ccb",
    "backbones/measured.json": "af922be44351dad0bdc2eb107395a8ad957d146451a47494a6702f7053a43acf",
}

# What digits may say besides measurements: names, versions, settings, sizes that are given.
NOT_MEASURED = (
    # Names and versions.
    r"SigLIP-2|Qwen2(\.5)?|Idefics3|FSDP2|ZeRO-[23]|NF4|int8|bfloat16|float32|base64|Apache 2\.0|Table 3|\bA\.[456]\b",
    r"transformers [45](\.\d+)?( and 5\.x)?",
    r"[Ss]tages? [0-3]( and [0-3])?|the same stage-2 checkpoint|\b(0\.5|1\.5)B( model)?\b|at most 35 minutes|http://127\.0\.0\.1:7860",
    # Enumerations, terms and arithmetic.
    r" [1-3]\. (?=\*\*)|95%( Wilson)? intervals?|the report's 1 - accuracy|1: one, drawn by the weights; 0: all",
    # Settings, which recipes, options and defaults hold.
    r"max_thinking_tokens=64|max_tiles=4|16-bit greyscale|96-pixel pictures|moved by one pixel",
    r"every 50 steps and at the end|they fit `?feature_cache_gb`? \(20\)|they fit \(20\)|Of 50,000 short rows",
    r"those that divide 128|rows of 512 tokens, of 1,024 in|LoRA r=64|the rest of 128 is accumulated|batches of 1 and 4",
    r"three seeds, 230 steps, 500 held-out questions|rationales of at most 12 tokens|traces of which 40% have a fault",
    r"seed 42, 900 held-out questions|Try it in 60 seconds",
    # Exports: kinds of weights, and rules of llama.cpp and of the exporters.
    r"float16|4-bit weights|\bf(16|32)\b|Q4_K|Q5_0|Q8_0|less than 1e-4|no multiple of 256 weights|LFM2|WebGPU",
)


def name_of(path: Path) -> str:
    return path.relative_to(REPO_ROOT).as_posix()


def plain(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tables_of(text: str) -> list[str]:
    """The Markdown tables of a text."""
    return re.findall(r"(?:^\|.*\|[ ]*\n)+", text, re.MULTILINE)


def digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def headed(first_cell: str) -> list[Rows]:
    """The tables of all documents whose header begins with a cell."""
    tables = [table_rows(table) for path in DOCUMENTS for table in tables_of(plain(path))]
    return [table for table in tables if table[0][0] == first_cell]


def printed(first_cell: str) -> list[Rows]:
    """The tables of all documents that are, cell by cell, what a run printed: one, unless somebody changed it."""
    return [table for table in headed(first_cell) if digest(table) == PRINTED[first_cell]]


def gates() -> Rows:
    """The gates of stage 0, from what its export measured."""
    rows = [["question", "accuracy", "gate"]]
    for name, scores in json.loads(plain(REPO_ROOT / "backbones" / "measured.json"))["gates"].items():
        kind = name.split("/")[1]
        if kind in LOOK_UP_TYPES or kind == "sum":
            floor = LOOK_UP_FLOOR if kind in LOOK_UP_TYPES else SUM_FLOOR
            rows.append([name.replace("/", ", "), f"{scores['steps']:.2f}", f"{floor:.2f}"])
    return rows


def parameters(folder: str) -> int:
    with safe_open(REPO_ROOT / "backbones" / folder / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.offset_keys()]
    count = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        count += size
    return count


@cache
def sources() -> tuple[dict[str, dict[str, Rows]], dict[str, dict]]:
    """The tables and the further figures of every file, by its name."""
    tables: dict[str, dict[str, Rows]] = {}
    figures: dict[str, dict] = {}
    for path in sorted((REPO_ROOT / "docs" / "results").glob("*.json")):
        content = read_results(path)
        tables[path.stem], figures[path.stem] = content["tables"], content["figures"]
    for first_cell in PRINTED:
        file, name = TABLES[first_cell]
        if whole := printed(first_cell):
            tables.setdefault(file, {})[name] = whole[0]
    arms, differences = map(table_rows, tables_of(plain(REPO_ROOT / "docs" / "ablations.md")))
    tables["ablations"] = {"arms": arms, "differences": differences}
    tables["backbones"] = {"gates": gates()}
    figures["backbones"] = json.loads(plain(REPO_ROOT / "backbones" / "measured.json")) | {
        "tower": parameters("siglip2-tiny") / 1e6,
        "language model": parameters("qwen2.5-tiny") / 1e6,
    }
    figures["training_settings"] = json.loads(plain(REPO_ROOT / "training_settings.json"))
    return tables, figures


def measured() -> dict[str, dict]:
    """What sentences are filled in from."""
    tables, figures = sources()
    return {
        file: figures.get(file, {}) | {name: by_name(rows) for name, rows in tables.get(file, {}).items()}
        for file in tables.keys() | figures.keys()
    }


def sentences() -> list[str]:
    return [template.format(**measured()) for template in SENTENCES]


def is_part(shown: Rows, whole: Rows) -> bool:
    """Whether a table has only columns and rows of another, in its order."""
    names = iter(enumerate(whole[0]))
    columns = [next((place for place, name in names if name == wanted), None) for wanted in shown[0]]
    if None in columns:
        return False
    rest = iter([[row[column] for column in columns] for row in whole[1:]])
    return all(row in rest for row in shown[1:])


def unexplained(text: str) -> list[str]:
    """The places of a document whose digits are neither of a file nor of a kind that is no measurement."""
    text = re.sub(r"\A---\n.*?^---\n", "", text, flags=re.MULTILINE | re.DOTALL)
    for table in tables_of(text):
        if table_rows(table)[0][0] in TABLES:
            text = text.replace(table, "")
    # Of code, its comments are read.
    text = re.sub(
        r"^```\w*\n(.*?)^```",
        lambda code: "\n".join(re.findall(r"(?:^|\s)#\s.*$", code.group(1), re.MULTILINE)),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    text = re.sub(r"<[^>]*>|\]\([^)]*\)", " ", text)
    text = " ".join(text.split())
    for sentence in sentences():
        text = text.replace(sentence, " ")
    text = re.sub(r"`([^`]*)`", lambda code: " " if re.search("[A-Za-z]", code[1]) else code[1], text)
    text = " ".join(text.split())
    for pattern in NOT_MEASURED:
        text = re.sub(pattern, " ", text)
    return [text[max(0, found.start() - 50) : found.end() + 30] for found in re.finditer(r"\d[\d.,]*", text)]


@pytest.mark.parametrize("template", SENTENCES)
def test_a_sentence_says_what_the_file_says(template):
    sentence = template.format(**measured())
    said = [" ".join(re.sub(r"<[^>]*>|\]\([^)]*\)", " ", plain(path)).split()) for path in DOCUMENTS]
    assert any(sentence in text for text in said), f"no document says: {sentence}"


@pytest.mark.parametrize("first_cell", TABLES)
def test_a_table_is_a_part_of_the_file_s(first_cell):
    file, name = TABLES[first_cell]
    shown = headed(first_cell)
    assert shown, f"no document has a table headed {first_cell!r}"
    for table in shown:
        assert is_part(table, sources()[0][file][name]), f"not as {file} has it: {table}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if name_of(path) not in WRITTEN], ids=name_of)
def test_no_figure_is_without_a_file(path):
    assert unexplained(plain(path)) == []


@pytest.mark.parametrize("first_cell", PRINTED)
def test_what_a_run_printed_is_as_it_was(first_cell):
    file, _ = TABLES[first_cell]
    assert not (REPO_ROOT / "docs" / "results" / f"{file}.json").exists(), (
        f"there is a file now: take {first_cell!r} out"
    )
    assert len(printed(first_cell)) == 1, (
        f"no document, or more than one, has the table {first_cell!r} as it was printed"
    )


@pytest.mark.parametrize("path", WRITTEN)
def test_what_a_command_wrote_is_as_it_was(path):
    assert hashlib.sha256((REPO_ROOT / path).read_bytes()).hexdigest() == WRITTEN[path]


def test_the_shipped_weights_are_those_that_were_measured():
    _, figures = sources()
    for file in ("shipped", "direct", "shifts", "anyres"):
        assert set(figures[file]["weights"].values()) == {checksum_of_weights(REPO_ROOT)}, file


def test_the_shipped_model_scores_what_the_table_and_the_card_say():
    tables, _ = sources()
    table, again = by_name(tables["demo"]["accuracy"]), by_name(tables["shipped"]["accuracy"])
    assert {name: row["stage3"] for name, row in table.items()} == {name: row["stage3"] for name, row in again.items()}
    card = yaml.safe_load(plain(REPO_ROOT / "README.md").split("---\n")[1])
    (result,) = card["model-index"][0]["results"]
    assert again["all"]["stage3"].startswith(f"{result['metrics'][0]['value']} ±")


def test_a_file_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {"rates": "| model | rate |\n|---|---|\n| tiny | 95.8 |"}, {"seconds": 3})
    assert read_results(path)["tables"] == {"rates": [["model", "rate"], ["tiny", "95.8"]]}
    for old, new in (("95.8", "96.8"), ('"seconds": 3', '"seconds": 4')):
        changed = tmp_path / "changed.json"
        changed.write_text(plain(path).replace(old, new))
        with pytest.raises(ValueError, match=r"changed.json is not as .* wrote it: run that command again"):
            read_results(changed)


@pytest.mark.parametrize(
    "text",
    [
        "It is right in 71% of cases.",
        "## 71% right\n",
        "`71`",
        "| new | table |\n|---|---|\n| a | 71 |\n",
        "```bash\nrun  # 71 times\n```\n",
    ],
)
def test_a_figure_without_a_file_is_found(text):
    (found,) = unexplained(text)
    assert "71" in found
