# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp eval``."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_mtp.cli.targets import target_folder
from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from pydantic import JsonValue

    from vllm_mtp.evaluation.offline import OfflineResult
    from vllm_mtp.evaluation.served import ServedResult
    from vllm_mtp.metrics import AcceptanceCounts


@dataclass
class Eval:
    """Measure how many drafts of a drafter its target would accept, without vLLM: on
    answers of `vllm-mtp generate`, by category of prompts, behind every token and in
    simulated greedy decoding. With --in-vllm, vLLM then answers the same prompts with
    the drafter, and its own counts stand beside the simulated ones."""

    positional: ClassVar[str] = "drafter"

    drafter: str = flag(
        "the drafter's folder; where it comes first, the flag's name can be left out"
    )
    target: str = flag("the target's Hugging Face folder or hub name")
    data: list[str] = flag(
        "folder that `vllm-mtp generate` wrote with this target; of several, all rows"
    )
    split: str = flag("its part to use: held_out or train", "held_out")
    num_speculative_tokens: int | None = flag(
        "tokens to draft per step (default: what the drafter was made for)", None
    )
    limit: int | None = flag("most sequences, from the start (default: all)", None)
    out: str | None = flag(
        "folder for evaluation.json, evaluation.md and acceptance.png", None
    )
    in_vllm: bool = flag("let vLLM answer the same prompts too, and compare", False)
    min_acceptance_length: float | None = flag(
        "exit code 1 unless the acceptance length is above this (in vLLM, if asked)",
        None,
    )
    baseline: str | None = flag(
        "another drafter for the same prompts in vLLM; exit code 1 unless this one's "
        "acceptance length is above it",
        None,
    )
    device: str | None = flag("such as cpu or cuda (default: cuda if there)", None)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag(
        "type to compute in; auto is the target's own", "auto"
    )

    def run(self) -> int:
        from dataclasses import replace

        if self.baseline is not None and not self.in_vllm:
            raise MTPError("--baseline: is measured in vLLM; add --in-vllm")

        from vllm_mtp.data.served_sampling import difference_from_served
        from vllm_mtp.data.settings import OFF_POLICY
        from vllm_mtp.data.store import read_provenance
        from vllm_mtp.evaluation.report import (
            markdown,
            require_matplotlib,
            write_report,
        )
        from vllm_mtp.sharing.folder import refresh_card

        if self.out is not None:
            require_matplotlib()  # before the work, not after it
        if self.in_vllm:
            self._require_served()  # likewise
        result = replace(self._evaluate(), settings=self._settings())
        made_with = read_provenance(self.data[0]).settings
        print(markdown(result))
        if temperature := result.settings["answers_temperature"]:
            print(
                f"\nThe answers were sampled at temperature {temperature}: in "
                "simulated decoding a draft counts as accepted only where it is the "
                "sampled token."
            )
        target = target_folder(self.target)
        if made_with.is_off_policy:
            said: str | None = f"{OFF_POLICY}; measure that with --in-vllm"
        else:
            said = difference_from_served(made_with.sampling, target)
        if said:
            print(f"\n{said[0].upper()}{said[1:]}.")
        if self.out is not None:
            files = write_report(result, self.out)
            if Path(self.out).resolve() == Path(self.drafter).resolve():
                refresh_card(self.out)
            print("\nwritten: " + ", ".join(map(str, files)))
        counts, least = result.total.simulated, self.min_acceptance_length
        if self.in_vllm:
            counts = self._serve(result)
        if self.baseline is not None:
            least = max(least or 1.0, self._measure_baseline(result.k))
        return _verdict(counts, least)

    def _require_served(self) -> None:
        """Refuse drafters that vLLM would, before the offline work."""
        from vllm_mtp.drafter.checkpoint import read_config
        from vllm_mtp.drafter.served import require_served
        from vllm_mtp.evaluation.offline import require_positions

        config = read_config(self.drafter)
        require_served(config, self.drafter)
        if self.baseline is None:
            return
        other = read_config(self.baseline)
        require_served(other, self.baseline)
        other.target.require_same(_facts_of(target_folder(self.target)))
        k = self.num_speculative_tokens
        require_positions(other, config.num_speculative_tokens if k is None else k)

    def _serve(self, result: "OfflineResult") -> "AcceptanceCounts":
        """vLLM's counts of the same prompts, printed beside the simulated ones."""
        from vllm_mtp.evaluation.report import compare_served

        served = self._measure(self.drafter, result.k)
        table, apart = compare_served(result, served.by_category)
        print("\n### Simulated decoding / vLLM, the same prompts\n\n" + table)
        print(
            f"\nlargest difference of a position over all: {apart:.2f} points; "
            f"{served.same_text} of {served.sequences} answers are those of the data"
        )
        return served.total

    def _measure_baseline(self, k: int) -> float:
        """The acceptance length of the other drafter in vLLM."""
        counts = self._measure(str(self.baseline), k).total
        positions = " ".join(f"{rate:.3f}" for rate in counts.acceptance_per_position)
        print(
            f"\nbaseline {self.baseline} in vLLM: acceptance length "
            f"{counts.acceptance_length:.3f}, by position {positions}"
        )
        return counts.acceptance_length

    def _measure(self, drafter: str, k: int) -> "ServedResult":
        from vllm_mtp.data.served_sampling import penalties_of
        from vllm_mtp.data.store import read_provenance
        from vllm_mtp.evaluation.served import measure_served

        target = target_folder(self.target)
        penalties = penalties_of(read_provenance(self.data[0]).settings.sampling)
        return measure_served(
            drafter, target, self._rows(target), k, self.dtype, penalties
        )

    def _evaluate(self) -> "OfflineResult":
        """Check all that is cheap to check, then load the target and draft."""
        from vllm_mtp.drafter.bound import BoundDrafter
        from vllm_mtp.drafter.checkpoint import load_drafter, read_config
        from vllm_mtp.evaluation.offline import evaluate_texts, require_positions
        from vllm_mtp.torch_host.hf_target import HFTarget
        from vllm_mtp.torch_host.load import load_frozen

        config = read_config(self.drafter)
        k = self.num_speculative_tokens
        k = config.num_speculative_tokens if k is None else k
        require_positions(config, k)
        target, device = target_folder(self.target), self._device()
        config.target.require_same(_facts_of(target))
        rows = self._rows(target)
        model = load_frozen(target, self.dtype, device)
        drafter = load_drafter(self.drafter, dtype=model.dtype, device=device)
        bound = BoundDrafter(drafter, HFTarget(model))
        return evaluate_texts(bound, _with_bar(rows), k)

    def _device(self) -> "torch.device":
        import torch

        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise MTPError(
                f"--device: got {name!r}, which cannot be used here ({reason}); "
                "expected such as cpu, cuda or cuda:1"
            ) from None

    def _rows(self, target: Path) -> "Dataset":
        from vllm_mtp.data.several import read_rows

        if self.limit is not None and self.limit < 1:
            raise MTPError(f"--limit: got {self.limit}, expected 1 or more")
        try:
            rows = read_rows(self.data, self.split, _facts_of(target), target)
        except ModuleNotFoundError as error:
            raise MTPError(
                f"--data needs the package {error.name!r}, which is not installed: "
                "pip install 'vllm-mtp[train]'"
            ) from None
        return rows.select(range(min(len(rows), self.limit or len(rows))))

    def _settings(self) -> "dict[str, JsonValue]":
        """What the numbers depend on, for the reader of the JSON."""
        from importlib.metadata import version

        from vllm_mtp.data.served_sampling import penalties_of
        from vllm_mtp.data.store import read_provenance
        from vllm_mtp.sharing.names import public_value

        made = [read_provenance(folder).settings for folder in self.data]
        generated = made[0]  # of all, but for lengths
        flags = ("drafter", "target", "split", "limit", "dtype")
        # Names without this machine's paths: the report may go with the drafter.
        told = public_value(
            {name: getattr(self, name) for name in flags}
            | {"data": self.data if self.data[1:] else self.data[0]}
        )
        return told | {
            "device": str(self._device()),
            "answers_temperature": generated.sampling.temperature,
            "answers_max_tokens": max(each.sampling.max_tokens for each in made),
            **({"answers_policy": "off-policy"} if generated.is_off_policy else {}),
            **{f"answers_{k}": v for k, v in penalties_of(generated.sampling).items()},
            "versions": {
                name: version(name) for name in ("vllm-mtp", "transformers", "torch")
            },
        }


def _verdict(counts: "AcceptanceCounts", least: float | None) -> int:
    if least is None or counts.acceptance_length > least:
        return 0
    print(
        f"FAILED: acceptance length {counts.acceptance_length:.3f}, expected more than "
        f"{least:.3f}"
    )
    return 1


def _facts_of(target: Path) -> Any:
    from vllm_mtp.drafter.target_facts import TargetFacts

    return TargetFacts.from_folder(target)


def _with_bar(rows: "Dataset") -> Iterable[Mapping[str, Any]]:
    from tqdm import tqdm

    # A log file shall not get a line per second.
    every = 1.0 if sys.stderr.isatty() else 30.0
    return tqdm(rows, unit="sequence", mininterval=every)
