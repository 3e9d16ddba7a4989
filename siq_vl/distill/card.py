"""The data card of a store, and pushing both to the Hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi

from siq_vl.distill.descriptions import DESCRIPTIONS
from siq_vl.distill.traces import evaluated, origins
from siq_vl.distill.yields import sealed_traces, store_yield, tables
from siq_vl.files import write_text

_CARD = """\
---
task_categories:
- visual-question-answering
- image-text-to-text
tags:
- chain-of-thought
- distillation
- siq-vl
size_categories:
- {size}
configs:
- config_name: default
  data_files: data/traces-*.parquet
---

# Reasoning traces

{made} traces of reasoning about pictures, generated offline by {teachers} and verified; {kept} were kept. Rejected ones
are here too, with the rules that reject them in `rejected_by`.{note}

```python
from datasets import load_dataset

traces = load_dataset("path/to/this", split="train").filter(lambda trace: trace["verdict"] == "kept")
```

One row is one trace: the sample's id, picture, question and gold answers; teacher, revision, prompt version and sampling
settings; the raw output, taken apart into `rationale` and `answer`; and the verdict. `hinted` says whether the teacher was
shown the gold answer. `agreement` is the share of the question's other answers that are the same.
{tables}

## Questions

{questions}

## Teachers

{settings}

## How the traces were verified

```json
{rules}
```
"""
_OF_DESCRIPTIONS = (f"{DESCRIPTIONS}/data/traces-*.parquet", f"{DESCRIPTIONS}/*.json")  # the journal stays here
_ASKED_HOW = ("teacher", "revision", "prompt", "sampling", "hinted")
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"}  # the first bound above counts
_LARGEST = "n>1M"
_ORACLE = " The teacher `figures` is a scripted oracle that knows the drawn pictures' truth, not a model."


def write_card(folder: Path) -> Path:
    """Write the data card, `README.md` in the store, and return its path."""
    found = store_yield(folder)
    note = ""
    if any(name.startswith("figures-") for name in found.teachers):
        note = _ORACLE
    shown_tables = ""
    for title, table in tables(found).items():
        shown_tables += f"\n## {title}\n\n{table}\n"
    # What teachers have said of the pictures, for students that see none, lies in a store inside this one.
    if list((folder / DESCRIPTIONS / "data").glob("traces-*.parquet")):
        for title, table in tables(store_yield(folder / DESCRIPTIONS)).items():
            shown_tables += f"\n## Descriptions of the pictures, in `{DESCRIPTIONS}`: {title}\n\n{table}\n"
    rules = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    rules.pop("questions", None)
    text = _CARD.format(
        size=_size_category(found.made),
        made=found.made,
        kept=found.kept,
        teachers=", ".join(f"`{name}`" for name in sorted(found.teachers)),
        note=note,
        tables=shown_tables,
        questions="\n".join(questions_lines(folder)),
        settings="\n".join(_settings(folder)),
        rules=json.dumps(rules, indent=2),
    )
    path = folder / "README.md"
    write_text(path, text)
    return path


def _size_category(rows: int) -> str:
    """Return the Hub's word for the size of a data set."""
    for bound, category in _SIZES.items():
        if rows < bound:
            return category
    return _LARGEST


def questions_lines(folder: Path) -> list[str]:
    """Return a line for each source of questions, and one for what must not be evaluated."""
    lines = []
    for origin in origins(folder):
        parts = [f"`{origin['source']}`"]
        for name in ("subset", "data_files", "split"):
            if name in origin:
                parts.append(f"{name} `{origin[name]}`")
        lines.append(f"- {', '.join(parts)}")
    if not lines:
        lines.append("The store does not say where its questions are from.")
    if found := evaluated(folder):
        lines.append(f"- **Do not evaluate what is trained on these traces on {', '.join(found)}.**")
    return lines


def _settings(folder: Path) -> list[str]:
    """Return a line for each way in which a teacher was asked."""
    ways = set()
    for row in sealed_traces(folder, _ASKED_HOW):
        ways.add(tuple(row[name] for name in _ASKED_HOW))
    lines = []
    for teacher, revision, prompt, sampling, hinted in sorted(ways):
        hint = ", gold answer shown" if hinted else ""
        lines.append(f"- `{teacher}`, revision `{revision}`, prompt `{prompt}`{hint}: `{sampling}`")
    return lines


def push_to_hub(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a store's shards, card and page as a data set; return its address. The journal stays here.

    Raises:
        ValueError: there is nothing to push.
    """
    if not list((folder / "data").glob("traces-*.parquet")):
        raise ValueError(f"{folder} holds no traces to push: run generate_traces.py first")
    write_card(folder)
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    found = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=str(folder),
        allow_patterns=["data/traces-*.parquet", "README.md", "report.html", "settings.json", *_OF_DESCRIPTIONS],
        commit_message="Reasoning traces",
    )
    return str(found)
