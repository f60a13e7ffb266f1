# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp demo-target``."""

from dataclasses import dataclass
from pathlib import Path

from vllm_mtp.flags import flag


@dataclass
class DemoTarget:
    """Make the folder of the demo target, SmolLM2-135M-Instruct, on first use, and
    print its path as the last line. Needs the extra `demo`; nothing is fetched."""

    cache_dir: str | None = flag("where to keep it (default: the user's cache)", None)

    def run(self) -> int:
        from vllm_mtp.data.demo_target import ensure_demo_target

        print(ensure_demo_target(Path(self.cache_dir) if self.cache_dir else None))
        return 0
