# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM with a diff applied, without a copy of it."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path, PurePath


def patched_vllm(diff: Path, root: Path) -> None:
    """Make a folder for ``PYTHONPATH`` that has vLLM as the diff leaves it.

    All is links to what is installed, but for the files that the diff changes and the
    folders that they are in.

    Args:
        diff: Unified, with paths as ``a/vllm/...``.
        root: Where to; new or empty.

    Raises:
        AssertionError: The diff does not fit, line for line.
    """
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parents[1]
    named = re.findall(r"^\+\+\+ b/(\S+)$", diff.read_text("utf-8"), re.MULTILINE)
    changed = set(map(PurePath, named))
    folders = {folder for path in changed for folder in path.parents}

    def link(folder: PurePath) -> None:
        (root / folder).mkdir(parents=True)
        stems = {path.stem for path in changed if path.parent == folder}
        for entry in (installed / folder).iterdir():
            path = folder / entry.name
            if path in folders:
                link(path)
            elif path in changed:
                shutil.copy(entry, root / path)
            elif entry.name == "__pycache__":
                # Linked one by one: Python must not write into the installed one.
                (root / path).mkdir()
                for code in entry.iterdir():
                    if code.name.partition(".")[0] not in stems:
                        (root / path / code.name).symlink_to(code)
            else:
                (root / path).symlink_to(entry)

    link(PurePath("vllm"))
    done = subprocess.run(
        ["git", "apply", "--verbose", diff.resolve()],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
