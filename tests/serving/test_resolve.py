# SPDX-License-Identifier: Apache-2.0
"""Method only: the drafter of an installed package that fits the target."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drafter.test_target_facts import FACTS
from tests.packages import copy_drafter, install
from vllm_mtp import installed
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import DrafterNotFoundError
from vllm_mtp.serving import resolve
from vllm_mtp.serving.resolve import resolve_drafter

Drafter = Callable[[str, str], Path]
NO_TARGET = "/no/target"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """vLLM's loggers do not propagate, so caplog would not see ours."""
    said: list[str] = []
    monkeypatch.setattr(
        resolve.logger, "warning", lambda text, *values: said.append(text % values)
    )
    return said


def offer_broken(site: Path) -> None:
    """Before all others in the order."""
    (site / "broken_maker" / "damaged").mkdir(parents=True)
    (site / "broken_maker" / "damaged" / "config.json").write_text("{}", "utf-8")
    (site / "broken_maker" / "__init__.py").write_text("1 / 0", "utf-8")
    places = {
        "damaged": "broken_maker.damaged",
        "empty": "broken_maker.empty",
        "lost": "nowhere.lost",
        "strange": "not a package",
    }
    install(site, "a-broken", places)


BROKEN = {
    "damaged": "damaged/config.json: not a valid drafter config: ",
    "empty": "empty/config.json: no such file",
    "lost": "no package 'nowhere' can be imported",
    "strange": "expected the folder as a package",
}


def test_broken_packages_do_not_harm_the_others(
    site: Path,
    warnings: list[str],
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
) -> None:
    offer_broken(site)
    for name in ("first", "second"):
        copy_drafter(tiny_drafter("llama", "shared-4"), site / "maker" / name)
    places = {"second": "maker.second", "first": "maker.first"}
    install(site, "b-good", places)
    target = tiny_targets["llama"]
    found = resolve_drafter(None, str(target), TargetFacts.from_folder(target))
    assert found == site / "maker" / "first"
    for line, (name, problem) in zip(warnings, BROKEN.items(), strict=True):
        assert f"skipped drafter {name!r} of a-broken: broken: " in line
        assert problem in line
        assert "\n" not in line


def test_where_nothing_fits_all_are_listed(
    site: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_broken(site)
    asked: list[str] = []
    monkeypatch.setattr(resolve, "_fingerprint", asked.append)
    with pytest.raises(DrafterNotFoundError) as error:
        resolve_drafter(None, NO_TARGET, FACTS)
    lines = str(error.value).splitlines()
    assert f"  {NO_TARGET}/mtp_placeholder: no config.json there" in lines
    for name, problem in BROKEN.items():
        (line,) = [one for one in lines if f"drafter {name!r} of a-broken" in one]
        assert problem in line.partition(": broken: ")[2]
    for name in ("cheap", "shared"):
        ours = f"  drafter {name!r} of vllm-mtp-smollm2-135m-instruct: target."
        assert any(line.startswith(ours) for line in lines)
    assert len(warnings) == len(BROKEN)
    assert asked == []  # the hub, say; the facts had ruled all out


def test_the_weights_are_asked_for_once(
    site: Path,
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("first", "second"):
        copy_drafter(tiny_drafter("llama", "shared-4"), site / "maker" / name)
    install(site, "b-good", {"first": "maker.first", "second": "maker.second"})
    asked: list[str] = []
    monkeypatch.setattr(resolve, "_fingerprint", asked.append)
    facts = TargetFacts.from_folder(tiny_targets["llama"])
    with pytest.raises(DrafterNotFoundError, match="other names or shapes"):
        resolve_drafter(None, NO_TARGET, facts)
    assert asked == [NO_TARGET]


def test_without_any_package_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "entry_points", lambda group: ())
    monkeypatch.setattr(resolve, "_fingerprint", lambda target: pytest.fail("asked"))
    with pytest.raises(DrafterNotFoundError) as error:
        resolve_drafter(None, NO_TARGET, FACTS)
    assert "none offers a drafter (group vllm_mtp.drafters)" in str(error.value)
    assert "Install a package that offers one" in str(error.value)
