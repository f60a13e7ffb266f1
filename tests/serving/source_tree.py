# SPDX-License-Identifier: Apache-2.0
"""Read Python packages without importing them: names, classes, signatures."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.If, ast.Try, ast.With)


@dataclass(frozen=True)
class Found:
    """A definition and the module that it stands in."""

    module: str
    node: ast.AST


@dataclass(frozen=True)
class Signature:
    """The parameters of a function, without ``self`` in a method.

    Attributes:
        positional: Names that a call can give by position.
        keyword_only: The others.
        required: Those without a default.
        takes_more_positional: It has ``*args``.
        takes_more_keywords: It has ``**kwargs``.
    """

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    takes_more_positional: bool = False
    takes_more_keywords: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return self.positional + self.keyword_only

    def problem_with_call(self, call: ast.Call) -> str | None:
        """Why the call does not fit; None when it does."""
        keywords = [keyword.arg for keyword in call.keywords]
        given = len(call.args)
        unpacks = None in keywords or any(isinstance(a, ast.Starred) for a in call.args)
        if given > len(self.positional) and not (self.takes_more_positional or unpacks):
            return f"takes {len(self.positional)} positional arguments, not {given}"
        unknown = {name for name in keywords if name is not None} - set(self.names)
        if unknown and not self.takes_more_keywords:
            return f"takes no {', '.join(sorted(unknown))}"
        missing = self.required - set(self.positional[:given]) - set(keywords)
        if missing and not unpacks:
            return f"also needs {', '.join(sorted(missing))}"
        return None


def signature(function: Function, *, bound: bool = False) -> Signature:
    """The parameters of a ``def``; without the first when it is bound."""
    arguments = function.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    needed = positional[: len(positional) - len(arguments.defaults)]
    needed += [
        argument.arg
        for argument, default in zip(
            arguments.kwonlyargs, arguments.kw_defaults, strict=True
        )
        if default is None
    ]
    return Signature(
        positional=tuple(positional[bound:]),
        keyword_only=tuple(argument.arg for argument in arguments.kwonlyargs),
        required=frozenset(needed) - set(positional[:bound]),
        takes_more_positional=arguments.vararg is not None,
        takes_more_keywords=arguments.kwarg is not None,
    )


class SourceTree:
    """The packages in one folder.

    Args:
        root: The folder.
        changed: Sources by module, in place of those in the folder.
    """

    def __init__(self, root: Path, changed: dict[str, str] | None = None) -> None:
        self._root = root
        self._changed = changed or {}
        self._modules: dict[str, ast.Module | None] = {}

    def with_changed(self, module: str, text: str) -> "SourceTree":
        """The same packages, but for one module."""
        twin = SourceTree(self._root, {module: text})
        twin._modules = self._modules | {module: ast.parse(text)}
        return twin

    def module(self, name: str) -> ast.Module | None:
        """The module's syntax tree; None when there is no such file."""
        if name not in self._modules:
            text = self.text(name)
            self._modules[name] = None if text is None else ast.parse(text)
        return self._modules[name]

    def text(self, name: str) -> str | None:
        """The module's source; None when there is no such file."""
        if name in self._changed:
            return self._changed[name]
        path = self._path(name)
        return path and path.read_text("utf-8")

    def _path(self, name: str) -> Path | None:
        base = self._root.joinpath(*name.split("."))
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def find(self, symbol: str) -> Found | None:
        """The definition of ``module:name`` or ``module:Class.member``.

        Imports are followed to where the name is defined, and members are also
        looked for in base classes.
        """
        module, _, path = symbol.partition(":")
        name, _, member = path.partition(".")
        found = self._in_module(module, name)
        if found is None or not member:
            return found
        return self.member(found, member)

    def _in_module(self, module: str, name: str) -> Found | None:
        tree = self.module(module)
        if tree is None:
            return None
        imported = None
        for node in _statements(tree.body):
            if name in _bound_names(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                imported = imported or self._imported(module, node, name)
        if imported is None and self.module(f"{module}.{name}"):
            return Found(f"{module}.{name}", self.module(f"{module}.{name}"))
        return imported

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Found | None:
        source = self._absolute(module, node)
        for alias in node.names:
            if source == module:
                continue
            if alias.name == "*":
                return self._in_module(source, name)
            if name == (alias.asname or alias.name):
                return self._in_module(source, alias.name)
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        is_package = path is not None and path.name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *filter(None, [node.module])])

    def classes(self, found: Found) -> Iterator[Found]:
        """A class and those that it derives from, as far as they are in the tree."""
        if not isinstance(found.node, ast.ClassDef):
            return
        yield found
        for base in found.node.bases:
            parent = self._in_module(found.module, ast.unparse(base).split("[")[0])
            if parent is not None:
                yield from self.classes(parent)

    def member(self, found: Found, name: str) -> Found | None:
        """A method, property or class variable."""
        for owner in self.classes(found):
            assert isinstance(owner.node, ast.ClassDef)
            for node in _statements(owner.node.body):
                if name in _bound_names(node):
                    return Found(owner.module, node)
        return None

    def attributes(self, found: Found) -> set[str]:
        """What ``self.`` can be followed by."""
        names: set[str] = set()
        for owner in self.classes(found):
            assert isinstance(owner.node, ast.ClassDef)
            for node in _statements(owner.node.body):
                names |= _bound_names(node)
            names |= assigned_to_self(owner.node)
            if any(ast.unparse(base).endswith("Enum") for base in owner.node.bases):
                names |= {"name", "value"}
        return names

    def constructor(self, found: Found) -> Signature | None:
        """What calling the class takes; None when the sources do not tell."""
        init = self.member(found, "__init__")
        if init is not None and isinstance(init.node, Function):
            return signature(init.node, bound=True)
        fields = [
            (node.target.id, node.value)
            for owner in reversed(list(self.classes(found)))
            for node in owner.node.body  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]
        if not fields:
            return None
        return Signature(
            positional=tuple(name for name, _ in fields),
            required=frozenset(name for name, value in fields if value is None),
        )


class Calls:
    """The calls in a definition, by the last name before the brackets."""

    def __init__(self, node: ast.AST) -> None:
        self._node = node

    @cached_property
    def lines(self) -> dict[str, int]:
        """First line of each."""
        lines: dict[str, int] = {}
        for node in ast.walk(self._node):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                lines[name] = min(node.lineno, lines.get(name, node.lineno))
        return lines

    def in_order(self, first: str, second: str) -> bool:
        """Whether both are called, and the one before the other."""
        lines = self.lines
        return first in lines and second in lines and lines[first] <= lines[second]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, also those below if, try and with."""
    for node in body:
        yield node
        if isinstance(node, _BLOCKS):
            yield from _statements(node.body)
            yield from _statements(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a statement defines; imports are followed elsewhere."""
    if isinstance(node, ast.ClassDef | Function):
        is_overload = any("overload" in ast.unparse(d) for d in node.decorator_list)
        return set() if is_overload else {node.name}
    if isinstance(node, ast.AnnAssign):
        return {ast.unparse(node.target)}
    if isinstance(node, ast.Assign):
        return {ast.unparse(target) for target in node.targets}
    return set()


def assigned_to_self(node: ast.ClassDef) -> set[str]:
    """Attributes that the methods of a class set on ``self``."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }
