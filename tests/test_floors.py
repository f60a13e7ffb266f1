# SPDX-License-Identifier: Apache-2.0
"""No import points up the floors of the package, those inside functions included."""

import ast
from pathlib import Path

import pytest

import vllm_mtp

PACKAGE = Path(vllm_mtp.__file__).parent
# From the ground up. Rooms of one floor stand side by side and do not know each other.
FLOORS = (
    # `engine` uses vLLM, so it needs nothing of ours; `plugin` has the method's name.
    {"engine", "errors", "families", "files", "flags", "interrupts"}
    | {"installed", "markdown", "metrics", "plugin", "processes"},
    {"drafter"},
    {"torch_host", "serving", "data"},  # two hosts of a drafter, and texts
    {"evaluation"},
    {"sharing"},
    {"training"},
    {"bench"},
    {"cli"},
    {"tools"},
)
GROUND = FLOORS[0]
# vLLM calls the plugin in every process, and only then is `serving` imported.
EXCEPTIONS = {("plugin", "serving.ledger")}
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def _imports(source: str) -> set[str]:
    """Modules of ours that a source imports anywhere, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module == "vllm_mtp"
                else {module}
            )
    prefix = "vllm_mtp."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)} | {
        name for name in found if name.partition(".")[0] in ("tools", "tests")
    }


def _upward(room: str, imported: str) -> bool:
    other = imported.partition(".")[0]
    if room == other or (room, imported) in EXCEPTIONS:
        return False
    if room in GROUND and other in GROUND:
        return False  # `files` raises what `errors` has
    return other not in HEIGHT or HEIGHT[other] >= HEIGHT[room]


@pytest.mark.parametrize(
    ("source", "upward"),
    [
        ("from vllm_mtp.drafter.config import DrafterConfig", False),
        ("from vllm_mtp import engine", False),
        ("import torch", False),
        ("from vllm_mtp.cli import flag", True),
        ("from vllm_mtp import cli", True),
        ("import vllm_mtp.cli.main", True),
        ("def f():\n    from vllm_mtp.evaluation import probe", True),
        ("if TYPE_CHECKING:\n    from vllm_mtp.torch_host.texts import x", True),
        ("from vllm_mtp.unknown import thing", True),
        ("from tests.servers import x", True),
        ("from tools.windows import x", True),
    ],
)
def test_the_scan_knows_up_from_down(source: str, upward: bool) -> None:
    assert any(_upward("serving", name) for name in _imports(source)) == upward


def test_no_import_points_up() -> None:
    upward, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":  # public names, wherever they live
            continue
        imported = _imports(path.read_text("utf-8"))
        seen += len(imported)
        upward += [
            f"{path.relative_to(PACKAGE)}: {name}"
            for name in sorted(imported)
            if _upward(room, name)
        ]
    assert upward == []
    assert seen > 300, "the scan sees little"


def test_every_room_has_a_floor() -> None:
    rooms = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}
    assert rooms == set(HEIGHT) - {"tools"}
