"""
What a command measured, kept as a file that documents are checked against.

A results file is JSON: the command, what it ran on, its tables as it printed them, further figures, and a checksum of all
that, so that a file changed by hand is known. Files kept in the repo are in `docs/results/`; see
`tests/test_figures_in_documents.py`.
"""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from siq_vl.files import write_text

REPO_ROOT = Path(__file__).resolve().parent.parent
Rows = list[list[str]]  # of a table, its header first


def table_rows(table: str) -> Rows:
    """Return the cells of a Markdown table, its header first, without the line of dashes."""
    lines = [line.strip().strip("|").split("|") for line in table.strip().splitlines()]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [header, *body]


def by_name(rows: Rows) -> dict[str, dict[str, str]]:
    """Return a table's cells by row and column.

    A row that begins with a dash belongs to the one above: "all, multi-step". The name of a row is as many of its first
    cells as it takes to tell the rows apart.
    """
    header, *body = rows
    named, above = [], ""
    for first, *rest in body:
        if not first.startswith("- "):
            above = first
        named.append([f"{above}, {first[2:]}" if first.startswith("- ") else first, *rest])
    width = next(n for n in range(1, len(header) + 1) if len({tuple(row[:n]) for row in named}) == len(named))
    return {", ".join(row[:width]): dict(zip(header, row, strict=True)) for row in named}


def write_results(path: Path, tables: Mapping[str, str], figures: Mapping[str, object] | None = None) -> None:
    """Write what the running command measured.

    Args:
        path: of the file; its folder is made.
        tables: Markdown tables as printed, by name.
        figures: single numbers and texts by name, such as the checksum of the weights.
    """
    content: dict[str, object] = {
        "command": _command(),
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "figures": dict(figures or {}),
        "tables": {name: table_rows(table) for name, table in tables.items()},
    }
    content["checksum"] = checksum(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_results(path: Path) -> dict:
    """Return a results file as it was written.

    Raises:
        ValueError: it was changed since.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    expected = content.pop("checksum", None)
    if expected != checksum(content):
        raise ValueError(f"{path.name} is not as `{content.get('command')}` wrote it: run that command again")
    return content


def checksum(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of a results file's content, whatever the layout of its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum_of_weights(checkpoint: str | Path) -> str | None:
    """Return the SHA-256 of a folder's weights, over its files in order of their names; None of a Hub id."""
    files: Sequence[Path] = sorted(Path(checkpoint).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _command() -> str:
    """Return the command that runs, its script relative to the repo."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(REPO_ROOT)) if script.is_relative_to(REPO_ROOT) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])
