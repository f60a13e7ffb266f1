# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp bench``."""

import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag
from vllm_mtp.interrupts import advise, raising

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_mtp.bench.plan import Load, Plan, Side
    from vllm_mtp.bench.report import Report
    from vllm_mtp.bench.run import Drafters
    from vllm_mtp.data.unseen import TrainingPrompts

_PROFILED_STEPS = 20
_TEXTS_BEFORE = 40  # prompts that make up the text of a long context
_MAX_CHARS = 1000  # of a prompt, so that short loads stay short
_ROOM_AROUND = 128  # tokens of the chat template, and of text that encodes to more


_NONE = "none"  # a flag that takes a list takes no empty one


@dataclass
class Bench:
    """Measure tokens per second side by side: no speculation, stock methods of vLLM,
    and our drafters, with fixed numbers of tokens and with the number left to the
    method. The servers are `vllm serve`; the sides take turns under the same load,
    which vLLM's own benchmark client makes. A second server without speculation shows
    by how much equal servers differ."""

    target: str | None = flag("the target's folder (default: the demo target)", None)
    drafters: list[str] = flag(
        "folders, or names that `vllm-mtp references` lists", ["cheap"]
    )
    num_speculative_tokens: list[str] = flag(
        "fixed numbers of tokens per draft to compare, or none", ["2", "4"]
    )
    calibrate: str | None = flag(
        "a drafter: choose the fastest of these numbers for each batch size, and "
        "measure that again (default: none, or the first drafter where the method "
        "cannot choose while it serves, as on a GPU)",
        None,
    )
    baselines: list[str] = flag(
        "stock methods to compare with: ngram, draft_model, or none", ["ngram"]
    )
    concurrency: list[int] = flag("requests at once", [1, 4, 8])
    prompts: str = flag(
        "JSONL file of prompts, or sharegpt or sharegpt:tasks: those of its prompts "
        "that none of the drafters was trained on, by their provenance.json",
        "sharegpt",
    )
    contexts: list[int] = flag(
        "also one request at a time behind so many tokens of text", []
    )
    categories: str | None = flag(
        "also one request at a time of each category in this JSONL file", None
    )
    profile: bool = flag("also show where the time of a step goes (CPU)", False)
    full: bool = flag(
        "all of it: both stock methods, all shipped drafters, 1 to 16 requests, 512 to "
        "7936 tokens before, the profile, new servers in each round; takes hours on a "
        "CPU",
        False,
    )
    num_prompts: int = flag(
        "prompts per load, at least; twice as many as are at once", 6
    )
    max_tokens: int = flag("longest answer, in tokens", 80)
    rounds: int = flag("how often each side meets each load", 3)
    max_model_len: int = flag("the servers' limit, in tokens", 1024)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = flag(
        "the servers' type (default: in which this machine is fastest)", None
    )
    enforce_eager: bool = flag("do not compile; slower, but starts sooner", False)
    fresh_servers: bool = flag(
        "new servers in each round: servers of the same kind differ by some percent",
        False,
    )
    into_card: bool = flag(
        "write what was measured into each drafter's folder and card as well", False
    )
    out: str = flag("folder for benchmark.json, benchmark.md, speed.png", "bench")
    show: list[str] = flag(
        "print the ratios of these benchmark.json side by side, and run nothing", []
    )

    def run(self) -> int:
        if self.show:
            from vllm_mtp.bench.several import side_by_side

            print(side_by_side(self.show))
            return 0
        from vllm_mtp.bench.report import markdown
        from vllm_mtp.evaluation.report import require_matplotlib
        from vllm_mtp.files import report_folder

        require_matplotlib()  # before the work, not after it
        if self.full:
            self._ask_for_all()
        drafters = self._drafters()
        plan = self._plan(drafters)
        with report_folder(Path(self.out)):
            pass  # likewise
        report = self._measure(plan, drafters)
        print(markdown(report))
        if self.into_card:
            _tell(report, drafters)
        return 0

    def _measure(self, plan: "Plan", drafters: "Drafters") -> "Report":
        """Measure, and write the report whenever there is more to it."""
        from tqdm import tqdm

        from vllm_mtp.bench.report import write
        from vllm_mtp.bench.run import num_steps, reports
        from vllm_mtp.bench.servers import sigterm_unwinds

        with (
            tempfile.TemporaryDirectory() as logs,
            tqdm(total=num_steps(plan, drafters), unit="step") as bar,
            sigterm_unwinds(),
            raising(),  # so that the servers end
        ):

            def progress(text: str) -> None:
                bar.set_description(f"{text:<44}")
                bar.update()

            command = shlex.join(["vllm-mtp", *sys.argv[1:]])
            files: list[Path] = []
            try:
                for report in reports(plan, drafters, command, Path(logs), progress):
                    files = write(report, Path(self.out))
                    advise(f"{self.out} has what was measured until then")
            finally:
                if files:
                    bar.write("written: " + ", ".join(map(str, files)))
        return report

    def _ask_for_all(self) -> None:
        from vllm_mtp.cli.references import shipped

        self.baselines = ["ngram", "draft_model"]
        known = [item.name for item in shipped()]
        self.drafters = list(dict.fromkeys([*self.drafters, *known]))
        self.concurrency = [1, 2, 4, 8, 16]
        self.contexts = self.contexts or [512, 2048, 7936]
        self.profile = self.fresh_servers = True

    def _drafters(self) -> "Drafters":
        from vllm_mtp.bench.plan import length_is_chosen_while_serving
        from vllm_mtp.bench.run import Drafters
        from vllm_mtp.cli.references import shipped
        from vllm_mtp.drafter.checkpoint import read_config
        from vllm_mtp.drafter.served import require_served

        known = {item.name: item.folder for item in shipped()}
        folders = {}
        for given in self.drafters:
            folder = known.get(given, given)
            if not Path(folder, "config.json").is_file():
                raise MTPError(
                    f"--drafters {given}: no drafter's folder, and none of the shipped "
                    f"ones ({', '.join(known)})"
                )
            require_served(read_config(folder), given)
            folders[Path(folder).name] = folder
        chosen = self.calibrate
        if chosen is not None and chosen not in folders:
            raise MTPError(
                f"--calibrate {chosen}: expected one of {', '.join(folders)}"
            )
        if chosen is not None and not self._lengths(folders[chosen]):
            raise MTPError(
                f"--calibrate {chosen}: there is nothing to choose from; give "
                "--num-speculative-tokens some that the drafter was made for"
            )
        if chosen is None and not length_is_chosen_while_serving():
            chosen = next((n for n, f in folders.items() if self._lengths(f)), None)
        return Drafters(folders, chosen)

    def _lengths(self, folder: str | None = None) -> list[int]:
        """Fixed numbers of tokens to compare: all, or those a drafter was made for."""
        from vllm_mtp.drafter.checkpoint import read_config

        if self.num_speculative_tokens == [_NONE]:
            return []
        given = " ".join(self.num_speculative_tokens)
        lengths = [int(k) if k.isdecimal() else 0 for k in self.num_speculative_tokens]
        if min(lengths) < 1:
            raise MTPError(
                f"--num-speculative-tokens {given}: expected whole numbers from 1 on, "
                f"or {_NONE}"
            )
        most = read_config(folder).num_speculative_tokens if folder else max(lengths)
        return [k for k in dict.fromkeys(lengths) if k <= most]

    def _plan(self, drafters: "Drafters") -> "Plan":
        from vllm_mtp import engine
        from vllm_mtp.bench.cpu_settings import fastest_dtype, fastest_environment
        from vllm_mtp.bench.plan import Plan
        from vllm_mtp.cli.targets import target_folder
        from vllm_mtp.data.demo_target import ensure_demo_target

        environment = fastest_environment(os.environ)  # as the user left it
        given = target_folder(self.target) if self.target else ensure_demo_target()
        target, known = Path(given), _trained_on(drafters)
        longest = max(self.contexts, default=0) + self.max_tokens + _ROOM_AROUND
        return Plan(
            target=str(target),
            dtype=self.dtype or fastest_dtype(),
            max_model_len=max(self.max_model_len, longest if self.contexts else 0),
            rounds=self.rounds,
            sides=self._sides(str(target), drafters),
            loads=self._loads(target, known),
            enforce_eager=self.enforce_eager,
            chat_template=engine.front_end(target).can_chat,
            profiled_steps=_PROFILED_STEPS if self.profile else 0,
            fresh_servers=self.fresh_servers,
            environment=environment,
            prompts=self._choice_in_words(known),
        )

    def _sides(self, target: str, drafters: "Drafters") -> "tuple[Side, ...]":
        from vllm_mtp.bench import plan
        from vllm_mtp.drafter.checkpoint import read_config

        stock: dict[str, Callable[[int], Side]] = {
            "ngram": plan.ngram_side,
            "draft_model": partial(plan.self_draft_side, target),
        }
        baselines = [] if self.baselines == [_NONE] else self.baselines
        if unknown := set(baselines) - set(stock):
            raise MTPError(
                f"--baselines: got {', '.join(sorted(unknown))}, expected "
                f"{', '.join(stock)}, or {_NONE} alone"
            )
        folders = drafters.folders
        made_for = [read_config(f).num_speculative_tokens for f in folders.values()]
        most = max(self._lengths() or made_for)
        sides = [plan.plain_side(), *(stock[name](most) for name in baselines)]
        per_request = plan.length_is_chosen_while_serving()
        for name, folder in folders.items():
            fixed = self._lengths(folder)
            sides += plan.drafter_sides(name, folder, fixed, per_request=per_request)
            sides.append(plan.auto_side(name, folder))
        # Last, where a machine that changes within a round shows most.
        return (*sides, plan.control_side())

    def _loads(
        self, target: Path, known: "Sequence[TrainingPrompts]"
    ) -> "tuple[Load, ...]":
        from vllm_mtp import engine
        from vllm_mtp.bench import loads

        most = loads.num_prompts(max(self.concurrency), self.num_prompts)
        wanted_prompts = most + _TEXTS_BEFORE if self.contexts else most
        prompts = self._prompts(wanted_prompts, known)
        wanted = loads.concurrency_loads(
            prompts, self.concurrency, self.num_prompts, self.max_tokens, self.prompts
        )
        if self.contexts:
            wanted += loads.context_loads(
                engine.tokenizer_of(target), prompts, self.contexts, self.max_tokens
            )
        if self.categories:
            wanted += loads.category_loads(
                self._by_category(), self.num_prompts, self.max_tokens
            )
        return tuple(wanted)

    def _prompts(self, num: int, known: "Sequence[TrainingPrompts]") -> tuple[str, ...]:
        from vllm_mtp.bench.plan import require_enough
        from vllm_mtp.data.sources import LATER, OF_SHAREGPT, SHAREGPT, TASKS
        from vllm_mtp.data.unseen import unseen_prompts

        if self.prompts not in OF_SHAREGPT:
            return tuple(text for _, text in _read(self.prompts, num))
        if self.prompts == LATER:
            raise MTPError(
                f"--prompts {LATER}: its prompts are conversations, and `bench` sends "
                f"questions; name {SHAREGPT}, {TASKS} or a JSONL file"
            )
        found = unseen_prompts(num, known, max_chars=_MAX_CHARS, source=self.prompts)
        trained = ", ".join(one.drafter for one in known)
        require_enough(found, num, f"{self.prompts} (not trained on: {trained})")
        return tuple(found)

    def _choice_in_words(self, known: "Sequence[TrainingPrompts]") -> str:
        from vllm_mtp.data.sources import OF_SHAREGPT
        from vllm_mtp.data.unseen import choice_in_words

        if self.prompts in OF_SHAREGPT:
            return choice_in_words(known, self.prompts)
        return f"of {Path(self.prompts).name}, whatever the drafters were trained on"

    def _by_category(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for category, text in _read(str(self.categories)):
            found.setdefault(category, []).append(text)
        return found


def _tell(report: "Report", drafters: "Drafters") -> None:
    """Into each drafter's card: as it is calibrated, or with the number left to it."""
    from vllm_mtp.bench.plan import auto_side, calibrated_side
    from vllm_mtp.bench.summary import speed_record, step_rows
    from vllm_mtp.sharing.folder import write_speed

    for name, folder in drafters.folders.items():
        schedule = report.schedules.get(name, [])
        if schedule:
            stage, side = report.stages[-1], calibrated_side(name, folder, schedule)
        else:
            stage, side = report.stages[0], auto_side(name, folder)
        steps = step_rows(name, report.profiles)
        speed = speed_record(
            report.machine, stage.plan, stage.lines, side.name, schedule, steps
        )
        write_speed(folder, speed)
        print(f"written: {folder}/speed.json, and its README.md")


def _trained_on(drafters: "Drafters") -> "list[TrainingPrompts]":
    """What is known of each drafter's training, under the name that the report has."""
    from vllm_mtp.sharing.provenance import training_prompts

    return [
        replace(training_prompts(folder), drafter=name)
        for name, folder in drafters.folders.items()
    ]


def _read(file: str, limit: int | None = None) -> list[tuple[str, str]]:
    """Category and text of each prompt."""
    from vllm_mtp.data.prompts import read_prompts, text_of
    from vllm_mtp.data.settings import SourceSettings

    rows = read_prompts(SourceSettings(prompts=file, limit=limit))
    return [(row.category, text_of(row.messages[-1]["content"])) for row in rows]
