# SPDX-License-Identifier: Apache-2.0
"""Compare a drafter with its probe, and say where the two part first."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_mtp.drafter.checkpoint import WEIGHTS_FILE, read_config
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.evaluation.blocks import Outcome, TorchRun
from vllm_mtp.evaluation.probe import Probe, checksums, coarsest, flat_config
from vllm_mtp.evaluation.sketch import relative_errors


@dataclass(frozen=True)
class Limits:
    """What float rounding may do.

    Attributes:
        error: Largest relative error of a stage, see `stage_error`.
        gap: Drafts may differ where the recorded best two logits lie this close, in
            standard deviations of the position's logits.
    """

    error: float
    gap: float


# By the coarsest type in play. Measured with untrained drafters of SmolLM2 on a CPU,
# vLLM against torch: errors up to 4e-6 in float32 and 0.049 in bfloat16, where drafts
# differed at gaps up to 0.10. A binding off by one gave at least 0.33 at its layer,
# and other drafts at gaps of at least 0.25. float16 is not measured: it rounds eight
# times finer than bfloat16.
LIMITS = {
    "float32": Limits(1e-3, 1e-3),
    "float16": Limits(0.03, 0.05),
    "bfloat16": Limits(0.12, 0.2),
}


@dataclass(frozen=True)
class Stage:
    """One comparison of a level.

    Attributes:
        where: Layer, tensor or config key.
        error: The worst value, or None where equality is all that counts.
        limit: The largest value that passes.
        fault: What is wrong, for comparisons without an error.
    """

    where: str
    error: float | None = None
    limit: float | None = None
    fault: str | None = None

    @property
    def failed(self) -> bool:
        if self.error is None or self.limit is None:
            return self.fault is not None
        return not self.error <= self.limit


@dataclass(frozen=True)
class Level:
    """Comparisons of one kind, in the order of computing."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def first_fault(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.failed), None)

    @property
    def worst(self) -> Stage:
        """The stage that is nearest to its limit."""
        return max(self.stages, key=lambda s: (s.error or 0) / (s.limit or 1))


def limits_for(probe: Probe, config: DrafterConfig, dtype: str) -> Limits:
    """The limits for a comparison with a target of type ``dtype``."""
    return LIMITS[coarsest(probe.dtype, config.dtype, dtype)]


def compare_files(probe: Probe, folder: Path | str) -> Level:
    """Hold config and tensors against those that were probed."""
    config = read_config(folder)
    telling = flat_config(config, with_defaults=False)
    # A probe may be older than a key. At its default, the key then changes nothing.
    now = {
        key: value
        for key, value in flat_config(config).items()
        if key in probe.config or key in telling
    }
    tensors = checksums(load_file(Path(folder, WEIGHTS_FILE)))
    stages = _compare_keys("config key", probe.config, now, "probed {}, now {}")
    stages += _compare_keys(
        "tensor", probe.checksums, tensors, "not the one that was probed"
    )
    whole = (Stage("config.json and model.safetensors"),)
    return Level("files", tuple(stages) or whole)


def _compare_keys(
    kind: str, probed: Mapping[str, object], now: Mapping[str, object], differs: str
) -> list[Stage]:
    missing = "none"
    return [
        Stage(
            f"{kind} {key}",
            fault=differs.format(probed.get(key, missing), now.get(key, missing)),
        )
        for key in {**probed, **now}
        if probed.get(key, missing) != now.get(key, missing)
    ]


def compare_facts(config: DrafterConfig, target: TargetFacts) -> Level:
    """Hold the target against what the drafter was made for."""
    differences = config.target.differences(target)
    faults = (Stage(*_split_fact(line)) for line in differences)
    return Level("facts", tuple(faults) or (Stage("the target's config"),))


def _split_fact(line: str) -> tuple[str, None, None, str]:
    where, _, fault = line.partition(": ")
    return f"config key {where}", None, None, fault


def compare_states(probe: Probe, run: TorchRun, limits: Limits) -> Level:
    """Hold the target's states, which the drafter reads, against the probed ones."""
    # With other bindings, other layers' states are read: compare what is in both.
    stages = tuple(
        Stage(name, stage_error(now, probe.run.states[name]), limits.error)
        for name, now in run.states.items()
        if name in probe.run.states
    )
    return Level("target", stages)


def compare_outcomes(
    name: str, probe: Probe, outcome: Outcome, config: DrafterConfig, limits: Limits
) -> Level:
    """Hold what a drafter computed against the probed values.

    Args:
        name: Of the level.
        probe: The probe.
        outcome: Of the same blocks.
        config: The drafter's.
        limits: See `limits_for`.
    """
    probed = probe.run.outcome
    if other := _other_shape(probed, outcome):
        return Level(name, (other,))
    names = _described(config)
    stages = [
        Stage(names.get(stage, stage), stage_error(now, expected), limits.error)
        for (stage, now), expected in zip(
            outcome.stages.items(), probed.stages.values(), strict=True
        )
    ]
    is_chained = config.markov is not None
    gap = worst_gap(
        outcome.drafts, probed.drafts, probe.run.gaps, is_chained=is_chained
    )
    return Level(name, (*stages, Stage("drafted tokens", gap, limits.gap)))


def _other_shape(probed: Outcome, now: Outcome) -> Stage | None:
    """What keeps two outcomes from being compared, if anything."""
    for what, before, after in (
        ("number of stages", len(probed.stages), len(now.stages)),
        ("tokens per draft", probed.drafts.shape[1], now.drafts.shape[1]),
    ):
        if before != after:
            return Stage(what, fault=f"probed {before}, now {after}")
    return None


def _described(config: DrafterConfig) -> dict[str, str]:
    """What each layer is, by its stage's name."""
    return {
        f"layer {i}": f"layer {i} ({layer.kind}"
        + (f", target layer {layer.target_layer})" if layer.kind != "mlp" else ")")
        for i, layer in enumerate(config.layers)
    }


def stage_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square over the blocks of the relative error, at the worst position.

    One number that shows a fault in every block, in one block and at one position. The
    worst row alone would not do: in bfloat16 single rows come far from the others.

    Args:
        got: Sketches ``[B, P, 17]`` or ``[N, 17]``.
        expected: The same shape.
    """
    return float(relative_errors(got, expected).square().mean(dim=0).sqrt().max())


def worst_gap(
    drafts: torch.Tensor,
    expected: torch.Tensor,
    gaps: torch.Tensor,
    *,
    is_chained: bool,
) -> float:
    """Largest gap of a position where the drafts differ.

    Args:
        drafts: ``[B, k]``.
        expected: ``[B, k]``.
        gaps: ``[B, k]``, see `TorchRun.gaps`.
        is_chained: Whether a position depends on the token before (Markov): then only
            the first difference of a block counts.

    Returns:
        0 where all are the same.
    """
    differs = drafts != expected
    if is_chained:
        differs &= differs.cumsum(dim=1) == 1
    return float(gaps.masked_fill(~differs, 0.0).max())
