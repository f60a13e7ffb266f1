# SPDX-License-Identifier: Apache-2.0
"""The reader behind the contract with vLLM, on a made-up package."""

import ast
from pathlib import Path

import pytest

from tests.serving.source_tree import SourceTree, signature

SOURCES = {
    "pkg/__init__.py": """
from .inner import *
from .inner.deep import Base as Renamed
""",
    "pkg/inner/__init__.py": "from pkg.inner.deep import Child, helper\n",
    "pkg/inner/deep.py": """
import enum
from typing import overload

class Base:
    field: int
    def __init__(self, first, second=2, *, third):
        self.set_here = first
    @property
    def size(self): ...

class Child(Base):
    def size_of(self): self.late = 1

class Point:
    x: int
    y: int = 0

class Mode(enum.Enum):
    NONE = 0

try:
    @overload
    def helper(a: int): ...
    def helper(a, b, *rest, key=None): ...
except ImportError:
    pass
""",
}


@pytest.fixture
def tree(tmp_path: Path) -> SourceTree:
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return SourceTree(tmp_path)


@pytest.mark.parametrize(
    "symbol",
    ["pkg:Child", "pkg:Renamed", "pkg:helper", "pkg:inner", "pkg:Child.size"],
)
def test_names_are_found_through_imports(symbol: str, tree: SourceTree) -> None:
    assert tree.find(symbol) is not None


@pytest.mark.parametrize(
    "symbol", ["pkg:gone", "gone:Child", "pkg:Child.gone", "pkg:Base"]
)
def test_other_names_are_not(symbol: str, tree: SourceTree) -> None:
    assert tree.find(symbol) is None


def test_attributes_are_those_of_the_bases_too(tree: SourceTree) -> None:
    child, mode = tree.find("pkg:Child"), tree.find("pkg.inner.deep:Mode")
    assert child is not None
    assert mode is not None
    wanted = {"field", "set_here", "late", "size", "size_of", "__init__"}
    assert tree.attributes(child) == wanted
    assert tree.attributes(mode) == {"NONE", "name", "value"}


# (symbol, a call, what is wrong with it)
CALLS = [
    ("pkg:helper", "f(1, 2, 3, key=4)", None),
    ("pkg:helper", "f(1, 2, other=4)", "takes no other"),
    ("pkg:helper", "f(1)", "also needs b"),
    ("pkg:helper", "f(*both)", None),
    ("pkg:Child", "f(1, third=3)", None),
    ("pkg:Child", "f(1, 2, 3, third=3)", "takes 2 positional arguments, not 3"),
    ("pkg:Child", "f(1)", "also needs third"),
    ("pkg.inner.deep:Point", "f(1, y=2)", None),
    ("pkg.inner.deep:Point", "f(z=2)", "takes no z"),
]


@pytest.mark.parametrize(("symbol", "call", "problem"), CALLS)
def test_calls_are_held_against_signatures(
    symbol: str, call: str, problem: str | None, tree: SourceTree
) -> None:
    found = tree.find(symbol)
    assert found is not None
    takes = (
        tree.constructor(found)
        if isinstance(found.node, ast.ClassDef)
        else signature(found.node)  # type: ignore[arg-type]
    )
    assert takes is not None
    expression = ast.parse(call, mode="eval").body
    assert isinstance(expression, ast.Call)
    assert takes.problem_with_call(expression) == problem
