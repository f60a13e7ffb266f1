# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp bench``."""

import shlex
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vllm_mtp.commands import flag
from vllm_mtp.errors import MTPError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_mtp.bench.plan import Load, Plan, Side
    from vllm_mtp.bench.run import Drafters

# Behind every prompt that the shipped drafters were trained on or chosen by.
_FIRST_UNSEEN_PROMPT = 9000


@dataclass
class Bench:
    """Measure tokens per second side by side: no speculation, vLLM's n-gram lookup, the
    target as its own draft_model, and our drafters with several numbers of tokens.
    Every side is a `vllm serve` of its own; they take turns under the same load, which
    vLLM's own benchmark client makes. Then the number of tokens is chosen for each
    batch size, and measured again."""

    target: str | None = flag("the target's folder (default: the demo target)", None)
    drafters: list[str] = flag(
        "folders, or names that `vllm-mtp references` lists", ["cheap", "shared"]
    )
    calibrate: str | None = flag(
        "which of them to calibrate (default: the first)", None
    )
    num_speculative_tokens: list[int] = flag("tokens per draft to compare", [1, 2, 4])
    baselines: list[str] = flag(
        "stock methods to compare with: ngram, draft_model", ["ngram", "draft_model"]
    )
    concurrency: list[int] = flag("requests at once", [1, 4, 8])
    prompts: str = flag("JSONL file of prompts, or sharegpt", "sharegpt")
    num_prompts: int = flag("prompts per load, at least; as many as are at once", 4)
    max_tokens: int = flag("longest answer, in tokens", 48)
    rounds: int = flag("how often each side meets each load", 3)
    max_model_len: int = flag("the servers' limit, in tokens", 1024)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = flag(
        "the servers' type (default: in which this machine is fastest)", None
    )
    enforce_eager: bool = flag("do not compile; slower, but starts sooner", False)
    out: str = flag("folder for benchmark.json, benchmark.md, speed.png", "bench")

    def run(self) -> int:
        from tqdm import tqdm

        from vllm_mtp.bench.report import markdown, write
        from vllm_mtp.bench.run import num_steps, run
        from vllm_mtp.evaluation.report import require_matplotlib

        require_matplotlib()  # before the work, not after it
        drafters = self._drafters()
        plan = self._plan(drafters)
        with (
            tempfile.TemporaryDirectory() as logs,
            tqdm(total=num_steps(plan, drafters), unit="step") as bar,
        ):

            def progress(text: str) -> None:
                bar.set_description(f"{text:<44}")
                bar.update()

            command = shlex.join(["vllm-mtp", *sys.argv[1:]])
            report = run(plan, drafters, command, Path(logs), progress)
        print(markdown(report))
        print("written: " + ", ".join(map(str, write(report, Path(self.out)))))
        return 0

    def _drafters(self) -> "Drafters":
        from vllm_mtp.bench.run import Drafters
        from vllm_mtp.commands.references import shipped

        known = {item.name: item.folder for item in shipped()}
        folders = {}
        for given in self.drafters:
            folder = known.get(given, given)
            if not Path(folder, "config.json").is_file():
                raise MTPError(
                    f"--drafters {given}: no drafter's folder, and none of the shipped "
                    f"ones ({', '.join(known)})"
                )
            folders[Path(folder).name] = folder
        chosen = self.calibrate or next(iter(folders), None)
        if chosen is not None and chosen not in folders:
            raise MTPError(
                f"--calibrate {chosen}: expected one of {', '.join(folders)}"
            )
        return Drafters(folders, chosen)

    def _plan(self, drafters: "Drafters") -> "Plan":
        from vllm_mtp.bench.plan import Plan
        from vllm_mtp.bench.run import fastest_dtype, has_chat_template
        from vllm_mtp.commands.targets import target_folder
        from vllm_mtp.demo.target import ensure_demo_target

        target = target_folder(self.target) if self.target else ensure_demo_target()
        return Plan(
            target=str(target),
            dtype=self.dtype or fastest_dtype(),
            max_model_len=self.max_model_len,
            rounds=self.rounds,
            sides=self._sides(str(target), drafters),
            loads=self._loads(),
            server_arguments=("--enforce-eager",) if self.enforce_eager else (),
            chat_template=has_chat_template(Path(target)),
        )

    def _sides(self, target: str, drafters: "Drafters") -> "tuple[Side, ...]":
        from vllm_mtp.bench import plan
        from vllm_mtp.checkpoint import read_config

        stock: dict[str, Callable[[int], Side]] = {
            "ngram": plan.ngram_side,
            "draft_model": partial(plan.self_draft_side, target),
        }
        if unknown := set(self.baselines) - set(stock):
            raise MTPError(
                f"--baselines: got {', '.join(sorted(unknown))}, expected "
                f"{', '.join(stock)}"
            )
        most = max(self.num_speculative_tokens)
        sides = [plan.plain_side(), *(stock[name](most) for name in self.baselines)]
        for name, folder in drafters.folders.items():
            made_for = read_config(folder).num_speculative_tokens
            # One that is not calibrated shows itself with all its tokens.
            wanted = self.num_speculative_tokens
            wanted = wanted if name == drafters.calibrate else [min(most, made_for)]
            sides += [
                plan.drafter_side(name, folder, k) for k in wanted if k <= made_for
            ]
        return tuple(sides)

    def _loads(self) -> "tuple[Load, ...]":
        from vllm_mtp.bench.plan import Load, require_enough

        wanted = {batch: max(self.num_prompts, batch) for batch in self.concurrency}
        prompts = self._prompts(max(wanted.values()))
        require_enough(prompts, max(wanted.values()), self.prompts)
        return tuple(
            Load(f"{batch} at once", prompts[:num], batch, self.max_tokens)
            for batch, num in wanted.items()
        )

    def _prompts(self, num: int) -> tuple[str, ...]:
        from vllm_mtp.data.prompts import read_prompts
        from vllm_mtp.data.settings import SourceSettings
        from vllm_mtp.demo.prompts import sharegpt_prompts

        if self.prompts == "sharegpt":
            found = sharegpt_prompts(num, skip=_FIRST_UNSEEN_PROMPT, max_chars=1000)
            return tuple(found)
        rows = read_prompts(SourceSettings(prompts=self.prompts, limit=num))
        return tuple(row.messages[-1]["content"] for row in rows)
