# SPDX-License-Identifier: Apache-2.0
"""The reference drafters that ship with the package.

``index.json`` lists their folders, best first: where several fit a target, the
first one is used when the user names no drafter.
"""

import json
from pathlib import Path

_HERE = Path(__file__).parent


def reference_folders() -> list[Path]:
    """Folders of the shipped drafters, best first."""
    names = json.loads((_HERE / "index.json").read_text("utf-8"))
    return [_HERE / name for name in names]
