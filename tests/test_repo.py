"""The repository as a whole: nothing in it points to one machine."""

import re
import subprocess
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent
TEXTS = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".jinja", ".svg"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO_ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [REPO_ROOT / name for name in listed.stdout.splitlines() if (REPO_ROOT / name).is_file()]


def test_no_path_of_one_machine():
    absolute = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|mnt)/\w")
    for path in tracked():
        if path.suffix in TEXTS and path.name != "tokenizer.json":
            found = absolute.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(REPO_ROOT)}: {found.group()}"


def test_files_are_small():
    """But for weights and tokenizers, which are the checkpoint that the repo is."""
    for path in tracked():
        if path.suffix not in (".safetensors",) and path.name != "tokenizer.json":
            assert path.stat().st_size < 500_000, path
