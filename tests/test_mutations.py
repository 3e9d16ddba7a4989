"""The list of mutations is true of the code as it is: each can be made, and names tests that are there."""

import ast
from collections import Counter

import pytest
from conftest import REPO_ROOT
from mutate import Mutation, read_mutations

MUTATIONS = read_mutations()


def nodes_of(file: str) -> set[str]:
    """The node ids of a test file, without parameters: of the file, its classes and its functions."""
    found = {file}
    for node in ast.parse((REPO_ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{file}::{node.name}"}
            found |= {f"{file}::{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(f"{file}::{node.name}")
    return found


def test_every_change_can_be_made():
    for mutation in MUTATIONS:
        mutation.applied((REPO_ROOT / mutation.file).read_text(encoding="utf-8"))
    assert len(MUTATIONS) >= 160
    assert max(Counter(MUTATIONS).values()) == 1


def test_every_change_names_tests_that_are_there():
    files = {test.partition("::")[0] for mutation in MUTATIONS for test in mutation.tests}
    known = set().union(*map(nodes_of, files))
    for mutation in MUTATIONS:
        assert mutation.tests and set(mutation.tests) <= known, mutation.name


def test_a_text_that_is_not_there_once_is_an_error():
    for old, new, message in (
        ("no", "yes", "stands 0 times"),
        ("a", "b", "stands 2 times"),
        ("c", "c", "is the old one"),
    ):
        with pytest.raises(ValueError, match=message):
            Mutation("file.py", old, new, ("tests/test_x.py",)).applied("a a c")
