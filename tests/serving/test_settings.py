# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in ``speculative_config``: taken, or refused with the key's name.

Through ``EngineArgs.create_engine_config``, as ``vllm serve`` and ``LLM(...)`` do.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.drafter import damage
from tests.drafter.damage import Damage, Good
from tests.drafter.test_target_facts import FACTS
from tests.serving.test_wrong_use import Drafter, start
from vllm_mtp.drafter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from vllm_mtp.errors import MTPError
from vllm_mtp.serving.resolve import resolve_drafter
from vllm_mtp.serving.settings import ALLOWED_KEYS
from vllm_mtp.serving.v1 import MTPPlaceholderProposer

MADE_FOR = 4  # tokens, of the drafter below
HUGE = [10**12, -(2**63), 10**30, 10**4000]
TEXTS = ["", " ", "\0", "a\0b", "x" * 5000, "\ud800", "\n", "true", "4", "${HOME}"]

_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(HUGE)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(TEXTS)
    | st.binary(max_size=4)
    | st.builds(object)
)
ANYTHING = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = [
    *("/nonexistent", "./no", "../no", "~/no", "~nobody-of-this-name/no", "/dev/null"),
    *("org/no-such-drafter", "no-such-drafter", "a/b/c", "https://example.org/x"),
    *("s3://bucket/x", "org/" + "x" * 300, "/" + "x" * 5000, "x/" * 3000, "-", "*"),
    *(__file__, f"{__file__}/x", "/proc/self/mem", "model.safetensors", "\\\\host\\x"),
]
_numbers = st.integers(-1, MADE_FOR + 1) | st.sampled_from(HUGE)
_schedules = st.lists(
    st.tuples(st.integers(-1, 9), st.integers(-1, 9), _numbers)
    | st.tuples(st.integers(1, 9), _numbers)
    | ANYTHING,
    max_size=3,
)


def _is_schedule(value: Any, most: int) -> bool:
    """The rule, by going through the batch sizes one by one."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    taken: set[int] = set()
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            return False
        if any(type(number) is not int for number in entry):
            return False
        first, last, tokens = entry
        sizes = set(range(first, min(last, 100) + 1))
        if first < 1 or not sizes or not 0 <= tokens <= most or taken & sizes:
            return False
        taken |= sizes
    return 1 in taken


# Of each key, what may stand there besides None, which counts as left out.
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "revision": lambda v: isinstance(v, str) and bool(v.strip()) and "\0" not in v,
    "num_speculative_tokens": lambda v: type(v) is int and 1 <= v <= MADE_FOR,
    "draft_sample_method": lambda v: v in ("greedy", "probabilistic"),
    "enforce_eager": lambda v: v is True or v is False,
    # On the V1 runner; what V2 takes is in `test_what_only_v2_does`.
    "rejection_sample_method": lambda v: v == "standard",
    "enable_adaptive_verification": lambda v: v is False,
}
VALUES = {
    "revision": ANYTHING | st.just("main"),
    "num_speculative_tokens": ANYTHING | _numbers,
    "draft_sample_method": ANYTHING
    | st.sampled_from(["greedy", "probabilistic", "Greedy", "random"]),
    "enforce_eager": ANYTHING | st.sampled_from([True, False, 0, 1, "false"]),
    "rejection_sample_method": ANYTHING
    | st.sampled_from(["standard", "block", "synthetic", "Block", ""]),
    "enable_adaptive_verification": ANYTHING | st.sampled_from([True, False, 1]),
    "num_speculative_tokens_per_batch_size": ANYTHING | _schedules,
}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up names are nobody's business."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def many(count: int, **kinds: Any) -> Callable[[Callable[..., None]], None]:
    """Run a check on that many cases, the same in every run."""

    def run(check: Callable[..., None]) -> None:
        settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(**kinds)(check))()

    return run


def refusal(target: Path, spec: dict[str, Any]) -> str | None:
    """What is said, or None where the settings are taken."""
    try:
        start(target, spec)
    except MTPError as error:
        message = str(error)
    else:
        return None
    assert len(message) < 2000
    return message


def test_every_value_is_taken_or_refused_by_its_key(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    target = tiny_targets["llama"]
    good = str(tiny_drafter("llama", "shared-4"))
    tally: Counter[str] = Counter()

    @many(800, spec=st.fixed_dictionaries({}, optional=VALUES))
    def _(spec: dict[str, Any]) -> None:
        given_ = {key: value for key, value in spec.items() if value is not None}
        wrong = [
            k for k, holds in ALLOWED.items() if k in given_ and not holds(spec[k])
        ]
        most = given_.get("num_speculative_tokens", MADE_FOR)
        schedule = "num_speculative_tokens_per_batch_size"
        limit = most if "num_speculative_tokens" not in wrong else MADE_FOR
        if schedule in given_ and not _is_schedule(spec[schedule], limit):
            wrong.append(schedule)
        message = refusal(target, {"model": good} | spec)
        tally["refused" if wrong else "taken"] += 1
        if wrong:
            assert message is not None
            assert any(f"speculative_config.{key}: got" in message for key in wrong)
        else:
            assert message is None

    print(dict(tally))
    assert tally["refused"] >= 300
    # What is drawn depends on which modules are loaded: 28 to 31 of 800 were taken.
    assert tally["taken"] >= 10


@pytest.mark.parametrize(
    ("key", "value"),
    [("rejection_sample_method", "block"), ("enable_adaptive_verification", True)],
)
def test_what_only_v2_does(
    key: str,
    value: Any,
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused where it is V1 for sure, and by V1's drafter in any case."""
    spec = {"model": str(tiny_drafter("llama", "shared-4")), key: value}
    message = refusal(tiny_targets["llama"], spec)
    assert message is not None
    assert f"speculative_config.{key}: got {value!r}" in message
    assert "only the V2 runner does it" in message
    # Where V2 is possible and is not taken, vLLM itself refuses the one.
    monkeypatch.setattr("vllm_mtp.serving.config.HAS_TRITON", True)
    if key == "rejection_sample_method":
        config = start(tiny_targets["llama"], spec)
        with pytest.raises(MTPError, match="only the V2 runner"):
            MTPPlaceholderProposer(config, torch.device("cpu"), None)
    else:
        with pytest.raises(ValueError, match="V1 does not support: adaptive"):
            start(tiny_targets["llama"], spec)


def test_every_other_place_of_a_drafter_is_refused(
    tiny_targets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of folders, files and hub repositories, and what is no name."""
    monkeypatch.chdir(tmp_path)
    places = st.sampled_from(PLACES) | ANYTHING.filter(lambda value: value is not None)

    @many(300, place=places)
    def _(place: Any) -> None:
        message = refusal(tiny_targets["llama"], {"model": place})
        assert message is not None
        # A folder that is there is named itself.
        here = isinstance(place, str) and place.strip() and Path(place).parts == ()
        assert "speculative_config.model: " in message or here or CONFIG_FILE in message


@pytest.mark.timeout(60)
def test_a_hub_that_never_answers_is_not_waited_for(
    tiny_targets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("vllm_mtp.serving.resolve._HUB_SECONDS", 0.2)
        message = refusal(tiny_targets["llama"], {"model": "nobody/nothing"})
    assert message is not None
    assert "'nobody/nothing' is no folder here" in message
    assert "Timeout" in message


def test_a_drafter_in_the_hubs_cache_needs_no_hub(
    tiny_drafter: Drafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--org--drafter"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    _files_of(tiny_drafter("llama", "shared-4")).write(snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40, "utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_drafter("org/drafter", "no-target", FACTS) == snapshot
    with pytest.raises(MTPError, match="'org/drafter' is no folder here"):
        resolve_drafter("org/drafter", "no-target", FACTS, revision="1" * 40)


def test_every_unknown_key_is_refused(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    good = str(tiny_drafter("llama", "shared-4"))
    of_vllm = set(_fields_of_vllm()) - set(ALLOWED_KEYS)
    keys = st.sampled_from(sorted(of_vllm)) | ANYTHING.filter(_is_unknown_key)

    @many(200, key=keys, value=ANYTHING)
    def _(key: Any, value: Any) -> None:
        message = refusal(tiny_targets["llama"], {"model": good, key: value})
        assert message is not None
        assert "speculative_config: method 'mtp_placeholder' does not take" in message


def _fields_of_vllm() -> list[str]:
    from vllm.config import SpeculativeConfig

    return list(SpeculativeConfig.__dataclass_fields__)


def _is_unknown_key(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return value not in ALLOWED_KEYS


def test_a_drafter_that_overflows_the_targets_type_is_refused(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter, tmp_path: Path
) -> None:
    """It is converted in the worker, where nobody would see the reason."""
    folder = tmp_path / "drafter"
    whole = _files_of(tiny_drafter("llama", "mixed"))
    whole.write(folder)
    start_in = {"model": str(folder)}
    start(tiny_targets["llama"], start_in, dtype="float16")
    tensors = damage.load(whole.weights)
    tensors["placeholders"][0, 0] = 1e5
    (folder / WEIGHTS_FILE).write_bytes(damage.save(tensors))
    start(tiny_targets["llama"], start_in, dtype="float32")
    with pytest.raises(MTPError, match=r"'placeholders' \(1 of 192.*too large"):
        start(tiny_targets["llama"], start_in, dtype="float16")


def _files_of(folder: Path) -> Good:
    files = [(folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return Good(folder.name, *files)


def test_a_damaged_drafter_does_not_start(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter, tmp_path: Path
) -> None:
    """As `tests/drafter/test_corruption.py` for reading, here for vLLM's start."""
    whole = _files_of(tiny_drafter("llama", "mixed"))
    other = _files_of(tiny_drafter("llama", "own-some"))
    folder = tmp_path / "drafter"

    @many(200, one=damage.any_of(damage.REFUSED)(whole, [other]))
    def _(one: Damage) -> None:
        whole.write(folder)
        one.do(folder)
        message = refusal(tiny_targets["llama"], {"model": str(folder)})
        damage.remove(tmp_path)
        assert message is not None, one.name
        assert str(folder) in message


def test_a_drafter_that_may_not_be_read_is_named(
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As another user finds it; root may read everything, so it is played."""
    whole = _files_of(tiny_drafter("llama", "mixed"))
    stat = Path.stat

    for secret in (
        tmp_path / "drafter",
        tmp_path / "drafter" / CONFIG_FILE,
        tmp_path / "drafter" / WEIGHTS_FILE,
    ):
        whole.write(tmp_path / "drafter")

        def refuse(path: Path, secret: Path = secret, **options: Any) -> os.stat_result:
            if path == secret:
                raise PermissionError(13, "Permission denied", str(path))
            return stat(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refuse)
            message = refusal(
                tiny_targets["llama"], {"model": str(tmp_path / "drafter")}
            )
        damage.remove(tmp_path)
        assert message is not None
        assert str(secret) in message
        assert "Permission denied" in message


def test_a_drafter_in_the_target_that_may_not_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    found = resolve_drafter(None, str(tmp_path), FACTS)
    assert found == tmp_path / "mtp_placeholder"
