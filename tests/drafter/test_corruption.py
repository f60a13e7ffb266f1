# SPDX-License-Identifier: Apache-2.0
"""Damaged drafters are refused with a reason, fast and without much memory.

The rule: a folder is refused unless it is, as it stands, one that the format allows.
Only these are:

- other finite weights, since the format has no checksum: such a drafter drafts worse,
  and the target checks each token;
- other token ids in a reduced vocabulary, all different and of the target's;
- other values in the config on which no tensor's shape or type depends;
- bytes that the format ignores: metadata and blanks in the header, other files.

300 cases in every run, some of each kind of damage; `pytest -m slow
tests/drafter/test_corruption.py` tries 2,500.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints_spec.goldens import fill_weights
from tests.drafter import damage
from tests.drafter.damage import Damage, Good
from tests.drafter.test_config import VALID
from vllm_mtp.drafter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_drafter,
    save_drafter,
)
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.sharding import require_divisible
from vllm_mtp.errors import MTPError
from vllm_mtp.serving.resolve import resolve_drafter

# Of each kind of damage in every run: 300 in all.
CASES = {"refused": 12, "values": 18, "harmless": 15}
# Of all kinds together.
MANY_CASES = {"refused": 1800, "values": 600, "harmless": 100}
MAX_MESSAGE = 4000
# Far below the sizes that the damaged files claim, above what one load needs.
MAX_GROWTH_KIB = 64 << 10

_OWN = VALID["layers"][1] | {"boundary_hidden": False, "bridge": False}
_SHARED: dict[str, Any] = {"kind": "shared", "target_layer": 0}
_PLAIN = {
    **{"markov": None, "draft_vocab_size": None, "dtype": "float32"},
    "extra_rows": 0,
}
_NO_BLOCK = _PLAIN | {"noise": None, "block_mask": "causal"}
_MLP: dict[str, Any] = {
    **{"kind": "mlp", "form": "plain", "intermediate_size": 8},
    "per_position": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "every option": {},
    "own layers": _PLAIN | {"layers": [_OWN, _OWN | {"target_layer": 3}]},
    "bridges": _PLAIN | {"layers": [_SHARED, _OWN | {"bridge": True}]},
    "LoRA": _PLAIN | {"layers": VALID["layers"][:1]},
    "Markov": _PLAIN | {"layers": [_SHARED], "markov": {"rank": 2}},
    "reduced vocabulary": _PLAIN | {"layers": [_OWN], "draft_vocab_size": 16},
    "heads": _NO_BLOCK | {"layers": [_MLP], "input": "boundary", "lm_head": "own"},
    "chain": _NO_BLOCK
    | {
        "layers": [_SHARED, _MLP],
        "chain": {"rms_norm_eps": 1e-5},
        "boundary_layers": [1, 3],
    },
}


def _save(kind: str, folder: Path) -> Good:
    config = DrafterConfig.model_validate_json(json.dumps(VALID | KINDS[kind]))
    drafter = Drafter(config)
    fill_weights(drafter, std=0.5)
    if drafter.draft_vocab is not None:
        drafter.draft_vocab.token_ids.copy_(torch.arange(16) * 2)
    save_drafter(drafter.to(getattr(torch, config.dtype)), folder)
    files = [(folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return Good(kind, *files)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> list[Good]:
    root = tmp_path_factory.mktemp("drafters")
    return [_save(kind, root / kind) for kind in KINDS]


def start(folder: Path) -> Drafter:
    """What serving does with a folder before anything is built."""
    facts = DrafterConfig.model_validate_json(json.dumps(VALID)).target
    found = resolve_drafter(str(folder), "no-target", facts)
    drafter = load_drafter(found)
    require_divisible(drafter.config, 1)
    return drafter


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where the process's peak grows by more than `MAX_GROWTH_KIB`."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak is now's
    before = _peak_kib()
    yield
    assert _peak_kib() - before <= MAX_GROWTH_KIB


class Checker:
    """Damages folders one by one, and keeps count."""

    def __init__(self, root: Path) -> None:
        self.tally: Counter[tuple[str, str]] = Counter()
        self._folder = root / "drafter"

    @property
    def total(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for (_, outcome), count in self.tally.items():
            total[outcome] += count
        return total

    def load(self, good: Good, one: Damage) -> Drafter | None:
        """The drafter, or None where it was refused as it should be."""
        good.write(self._folder)
        try:
            one.do(self._folder)
            with little_memory():
                drafter = self._start()
            self.tally[one.name, "loaded" if drafter else "refused"] += 1
            return drafter
        finally:
            damage.remove(self._folder.parent)

    def _start(self) -> Drafter | None:
        try:
            return start(self._folder)
        except MTPError as error:
            refusal = error
        text = str(refusal)
        assert str(self._folder) in text
        assert len(text.replace(str(self._folder), "")) <= MAX_MESSAGE
        assert "Traceback" not in text
        return None


def weights_are_allowed(good: Good, weights: bytes, vocab_size: int) -> bool:
    """The format's rule for the body of a weights file, without torch."""
    types = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BF16": "<u2"}
    body = weights[good.body_start :]
    for name in good.tensor_names:
        entry = good.header[name]
        raw = body[slice(*entry["data_offsets"])]
        found = np.frombuffer(raw, types[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            found = (found.astype("<u4") << 16).view("<f4")
        if entry["dtype"] != "I64":
            allowed = np.isfinite(found).all()
        else:
            in_range = (found >= 0) & (found < vocab_size)
            allowed = in_range.all() and len(np.unique(found)) == len(found)
        if not allowed:
            return False
    return True


def require_allowed(good: Good, one: Damage, drafter: Drafter | None) -> None:
    """Hold the outcome of a flipped bit against the rule above."""
    if one.name == "flipped bit in a weight":
        scratch: list[bytes] = []
        one.do(_Catch(scratch))  # type: ignore[arg-type]
        allowed = weights_are_allowed(good, scratch[0], VALID["target"]["vocab_size"])
        assert (drafter is not None) == allowed
    elif drafter is not None:
        entries = {name: good.header[name]["shape"] for name in good.tensor_names}
        found = {name: list(t.shape) for name, t in drafter.state_dict().items()}
        assert found == entries


class _Catch:
    """Stands for a folder, and keeps what is written into a file there."""

    def __init__(self, written: list[bytes]) -> None:
        self._written = written

    def __truediv__(self, name: str) -> "_Catch":
        return self

    def write_bytes(self, data: bytes) -> None:
        self._written.append(data)


def _run(
    drafters: list[Good],
    count: int,
    kind: damage.Kind,
    check: Callable[[Good, Damage], None],
) -> None:
    cases = st.sampled_from(drafters).flatmap(
        lambda good: st.tuples(
            st.just(good), kind(good, [other for other in drafters if other != good])
        )
    )

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(case=cases)
    def every(case: tuple[Good, Damage]) -> None:
        check(*case)

    every()


def must_be_refused(checker: Checker, good: Good, one: Damage) -> None:
    assert checker.load(good, one) is None, one.name


def follows_the_rule(checker: Checker, good: Good, one: Damage) -> None:
    require_allowed(good, one, checker.load(good, one))


def must_load(checker: Checker, good: Good, one: Damage) -> None:
    assert checker.load(good, one) is not None, one.name


# name: (kinds of damage, what is to come of them)
OUTCOMES = {
    "refused": (damage.REFUSED, must_be_refused),
    "values": (damage.VALUES, follows_the_rule),
    "harmless": (damage.HARMLESS, must_load),
}


def test_about_three_hundred_cases_in_every_run() -> None:
    numbers = {name: len(kinds) for name, (kinds, _) in OUTCOMES.items()}
    assert sum(CASES[name] * number for name, number in numbers.items()) == 300


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [(outcome, kind) for outcome, (kinds, _) in OUTCOMES.items() for kind in kinds],
)
def test_every_kind_of_damage(
    outcome: str, kind: str, drafters: list[Good], tmp_path: Path
) -> None:
    kinds, check = OUTCOMES[outcome]
    checker = Checker(tmp_path)
    _run(drafters, CASES[outcome], kinds[kind][0], partial(check, checker))
    print(f"cases: {dict(checker.tally)}")
    # Hypothesis may find that there are no more.
    assert checker.total.total() > CASES[outcome] // 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_damaged_drafters(drafters: list[Good], tmp_path: Path) -> None:
    checker = Checker(tmp_path)
    for outcome, (kinds, check) in OUTCOMES.items():
        every = damage.any_of(kinds)
        _run(drafters, MANY_CASES[outcome], every, partial(check, checker))
    print(f"cases: {dict(checker.total)}; {dict(checker.tally)}")
    assert checker.total["refused"] >= 1000
    assert checker.total["loaded"] >= 100
    assert checker.tally["flipped bit in a weight", "refused"]
