# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp check``."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_mtp.cli.targets import target_folder
from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag

if TYPE_CHECKING:
    from vllm_mtp.drafter.bound import BoundDrafter
    from vllm_mtp.drafter.config import DrafterConfig
    from vllm_mtp.evaluation.blocks import ProbeTexts
    from vllm_mtp.evaluation.compare import Level, Stage
    from vllm_mtp.evaluation.probe import Probe

_ADVICE = {
    "files": "the folder is not what training wrote: copy the drafter again, or train "
    "it again",
    "facts": "use the target that the drafter was made for",
    "target": "the target computes something else than the one in training: use that "
    "target",
    "torch": "the drafter computes something else than in training: its config or "
    "weights are not those that were trained",
    "vLLM": "vLLM computes something else than torch: please report this, with the "
    "output of `vllm-mtp doctor`",
}
_NO_PROBE = """\
The folder has no probe.safetensors, so training left nothing to compare with. Only
vLLM was compared with torch, both from this folder. NOT checked: whether the folder is
what was trained. Wrong weights or a wrong config are wrong in both."""
_NO_WINDOW = """\
NOT checked: what the drafter reads behind a long prefix. It leaves out some of it from
{} tokens on, and no text here is as long."""
# Split at empty lines.
_TEXTS = """\
The lighthouse stood at the end of a long pier. Every evening its keeper climbed the
stairs, counted the ships on the horizon and wrote their number into a book.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

To boil an egg, put it into cold water and heat the water slowly. After it boils, wait
for six minutes, then cool the egg under running water and peel it.

Question: why is the sky blue? Answer: air scatters short waves of light more than long
ones, so blue light reaches the eye from every direction.
"""


@dataclass
class Check:
    """Compare what vLLM's drafter computes with what the trainer's drafter computed for
    the same tokens, and say at which layer or tensor they part. Exit code 0 only if
    they are the same up to float rounding. Training leaves its values in the drafter's
    folder (probe.safetensors)."""

    positional: ClassVar[str] = "drafter"

    drafter: str = flag(
        "the drafter's folder; where it comes first, the flag's name can be left out"
    )
    target: str = flag("the target's Hugging Face folder")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag(
        "type to run the target in (auto: as in training, else as stored)", "auto"
    )
    skip_checksums: bool = flag("do not compare config and tensors byte by byte", False)
    all_layers: bool = flag("print every layer, not only where they part", False)
    text: str | None = flag(
        "UTF-8 text file, one text per line, to draft behind when there is no probe "
        "(default: built-in texts)",
        None,
    )
    record: bool = flag(
        "write the probe, and check nothing. This takes the folder as it is for the "
        "truth, so it only makes sense right after training",
        False,
    )
    data: str | None = flag(
        "with --record: a folder of `vllm-mtp generate`; its held-out texts are used",
        None,
    )

    def run(self) -> int:
        from vllm_mtp.drafter.checkpoint import load_drafter
        from vllm_mtp.drafter.layout import first_to_skip
        from vllm_mtp.drafter.served import require_served
        from vllm_mtp.drafter.target_facts import TargetFacts
        from vllm_mtp.evaluation.blocks import tries_window
        from vllm_mtp.evaluation.compare import compare_facts
        from vllm_mtp.evaluation.probe import read_probe

        target = target_folder(self.target)
        config = load_drafter(self.drafter).config  # also checks every tensor
        facts = compare_facts(config, TargetFacts.from_folder(target))
        if self.record:
            return self._record(target, facts)
        require_served(config, self.drafter)
        probe = read_probe(self.drafter)
        levels = []
        for level in self._levels(target, config, facts, probe):
            print(render(level, all_layers=self.all_layers), flush=True)
            levels.append(level)
        print(f"\n{verdict(levels)}")
        if probe is None:
            print(_NO_PROBE)
        elif config.prefix_window and not tries_window(probe.texts, config):
            print(_NO_WINDOW.format(first_to_skip(config.prefix_window)))
        return int(any(level.first_fault for level in levels))

    def _levels(
        self,
        target: Path,
        config: "DrafterConfig",
        facts: "Level",
        probe: "Probe | None",
    ) -> "Iterator[Level]":
        """The comparisons, the cheapest first."""
        from vllm_mtp.evaluation.blocks import run_in_torch
        from vllm_mtp.evaluation.compare import (
            compare_files,
            compare_outcomes,
            compare_states,
            limits_for,
        )
        from vllm_mtp.evaluation.probe import make_probe
        from vllm_mtp.evaluation.probe_in_vllm import run_in_vllm

        if probe is not None and not self.skip_checksums:
            yield compare_files(probe, self.drafter)
        yield facts
        if facts.first_fault:
            return  # neither torch nor vLLM would take the drafter
        dtype = self._dtype(target, probe)
        bound = _bind(self.drafter, target, dtype)
        if probe is None:
            probe = make_probe(bound, self._texts(target, bound))
            limits = limits_for(probe, config, dtype)
        else:
            limits = limits_for(probe, config, dtype)
            run = run_in_torch(bound, probe.texts)
            yield compare_states(probe, run, limits)
            yield compare_outcomes("torch", probe, run.outcome, config, limits)
        del bound
        _free_memory()
        outcome = run_in_vllm(self.drafter, target, probe.texts, dtype)
        yield compare_outcomes("vLLM", probe, outcome, config, limits)

    def _dtype(self, target: Path, probe: "Probe | None") -> str:
        if self.dtype != "auto":
            return self.dtype
        if probe is not None:
            return probe.dtype
        from vllm_mtp.drafter.target_facts import hf_config_of
        from vllm_mtp.evaluation.probe import PRECISIONS

        found = str(hf_config_of(target).get_text_config().dtype)
        found = found.removeprefix("torch.")
        return found if found in PRECISIONS else "bfloat16"

    def _record(self, target: Path, facts: "Level") -> int:
        from vllm_mtp.evaluation.probe import write_probe

        if fault := facts.first_fault:
            raise MTPError(f"{fault.where}: {fault.fault}. {_ADVICE['facts']}")
        bound = _bind(self.drafter, target, self._dtype(target, None))
        print(
            f"probe written to {write_probe(self.drafter, bound, self._rows(target))}"
        )
        return 0

    def _texts(self, target: Path, bound: "BoundDrafter") -> "ProbeTexts":
        from vllm_mtp.evaluation.probe import texts_for

        return texts_for(bound, self._rows(target))

    def _rows(self, target: Path) -> Sequence[dict[str, Any]]:
        """Texts to draft behind."""
        if self.data is not None:
            from vllm_mtp.data.store import HELD_OUT, read_split

            return read_split(self.data, HELD_OUT)
        if self.text is None:
            return _built_in_rows(target, self._tokenizer_mode())
        path = Path(self.text)
        if not path.is_file():
            raise MTPError(f"--text {path}: no such file")
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise MTPError(f"--text {path}: not UTF-8 ({error})") from None
        wanted = [line for line in lines if line.strip()]
        return _tokenized(target, wanted, self._tokenizer_mode())

    def _tokenizer_mode(self) -> str:
        """That of the answers that the drafter was trained on, where it says."""
        from vllm_mtp.sharing.provenance import read_provenance

        found = read_provenance(self.drafter)
        if found is None or found.data is None:
            return "auto"
        return found.data.generation.settings.engine.tokenizer_mode


def _bind(folder: str, target: Path, dtype: str) -> "BoundDrafter":
    """The drafter on its target in plain torch."""
    import torch

    from vllm_mtp.drafter.bound import BoundDrafter
    from vllm_mtp.drafter.checkpoint import load_drafter
    from vllm_mtp.torch_host.hf_target import HFTarget
    from vllm_mtp.torch_host.load import load_frozen

    device = "cuda" if torch.cuda.is_available() else "cpu"
    host = HFTarget(load_frozen(target, dtype, device))
    drafter = load_drafter(folder, dtype=getattr(torch, dtype), device=device)
    return BoundDrafter(drafter, host)


def _free_memory() -> None:
    """vLLM takes most of a GPU's memory, and looks at what is free first."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tokenized(
    target: Path, texts: Sequence[str], tokenizer_mode: str
) -> list[dict[str, Any]]:
    from vllm_mtp.drafter.target_facts import hf_config_of
    from vllm_mtp.engine import tokenizer_of

    tokenizer = tokenizer_of(target, tokenizer_mode)
    rows = [{"input_ids": list(tokenizer(text)["input_ids"])} for text in texts]
    size = hf_config_of(target).get_text_config().vocab_size
    highest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if highest >= size:
        raise MTPError(
            f"--target {target}: its tokenizer gives the token {highest}, and its "
            f"embedding has {size} rows: the tokenizer is another model's, or has "
            "tokens added to it; use the model's own"
        )
    return rows


def _built_in_rows(target: Path, tokenizer_mode: str) -> list[dict[str, Any]]:
    """The built-in texts, or arbitrary tokens where there is no tokenizer."""
    from vllm_mtp.drafter.target_facts import hf_config_of
    from vllm_mtp.engine import has_tokenizer

    if has_tokenizer(target):
        return _tokenized(target, _TEXTS.split("\n\n"), tokenizer_mode)
    size = hf_config_of(target).get_text_config().vocab_size
    return [
        {"input_ids": [(37 * i * i + 11 * row) % size for i in range(48 + 8 * row)]}
        for row in range(4)
    ]


def render(level: "Level", *, all_layers: bool) -> str:
    """A level as lines of the table: in short its worst stage or where it parts."""
    fault = level.first_fault
    if all_layers:
        shown = list(level.stages)
    elif fault is None:
        shown = [level.worst]
    else:
        first = level.stages.index(fault)
        shown = list(level.stages[max(first - 1, 0) : first + 1])
    lines = [_line(level.name, stage) for stage in shown]
    later = sum(stage.failed for stage in level.stages) - 1
    if fault is not None and later and not all_layers:
        lines.append(f"  {level.name:<7} and {later} more of {len(level.stages)}")
    return "\n".join(lines)


def _line(level: str, stage: "Stage") -> str:
    mark = "FAIL" if stage.failed else "ok"
    if stage.error is None:
        numbers = "" if stage.fault is None else f"{stage.fault:<40}"
    else:
        numbers = f"worst error {stage.error:<10.3g}limit {stage.limit:<10.3g}"
    return f"  {level:<7} {stage.where:<36} {numbers:<40} {mark}"


def verdict(levels: "Sequence[Level]") -> str:
    """One line: passed, or where training and serving part first."""
    for level in levels:
        if fault := level.first_fault:
            return (
                f"FAILED: they part at {level.name}, {fault.where}"
                + (f" ({fault.fault})" if fault.fault else "")
                + f". {_ADVICE[level.name][0].upper()}{_ADVICE[level.name][1:]}."
            )
    return f"PASSED: {', '.join(level.name for level in levels)} agree"
