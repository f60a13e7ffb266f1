# SPDX-License-Identifier: Apache-2.0
"""Which drafters installed packages offer, and where they are."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.packages import install
from vllm_mtp.errors import CheckpointError, DrafterNotFoundError
from vllm_mtp.installed import InstalledDrafter, installed_drafters, installed_folder

OURS = "vllm-mtp-smollm2-135m-instruct"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def names(*distributions: str) -> list[str]:
    found = installed_drafters()
    return [one.name for one in found if one.distribution in distributions]


def test_they_come_by_distribution_and_then_by_name(site: Path) -> None:
    install(site, "b-drafters", {"y": "b.y", "x": "b.x"})
    install(site, "a-drafters", {"z": "a.z"})
    assert names("a-drafters", "b-drafters") == ["z", "x", "y"]
    found = {one.name: one for one in installed_drafters()}
    assert found["y"] == InstalledDrafter("y", "b-drafters", "b.y")


def test_ours_are_found_with_their_names() -> None:
    assert names(OURS) == ["cheap", "shared"]
    assert (installed_folder("cheap") / "model.safetensors").stat().st_size > 10**7


def test_a_name_that_two_distributions_have_means_neither(site: Path) -> None:
    install(site, "other-drafters", {"cheap": "other.cheap", "fast": "other.fast"})
    (site / "other").mkdir()
    assert names(OURS) == [f"{OURS}:cheap", "shared"]
    assert names("other-drafters") == ["other-drafters:cheap", "fast"]
    assert installed_folder("other-drafters:cheap") == site / "other" / "cheap"
    with pytest.raises(DrafterNotFoundError, match=f"'cheap', .*{OURS}:cheap"):
        installed_folder("cheap")


def test_no_code_of_a_package_is_run(site: Path) -> None:
    for folder in (site / "loud", site / "loud" / "drafter"):
        folder.mkdir()
        (folder / "__init__.py").write_text("raise SystemExit('was imported')", "utf-8")
    drafter = InstalledDrafter("d", "loud-drafters", "loud.drafter")
    assert drafter.folder() == site / "loud" / "drafter"
    assert not {"loud", "loud.drafter"} & set(sys.modules)


def test_a_namespace_may_have_several_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        monkeypatch.syspath_prepend(root)
        (root / "maker" / "small").mkdir(parents=True)
    (roots[0] / "maker" / "small" / "config.json").touch()
    (roots[1] / "maker" / "large").mkdir()
    small = InstalledDrafter("d", "maker-drafters", "maker.small").folder()
    assert small == roots[0] / "maker" / "small"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("gone.drafter", "no package 'gone' can be imported"),
        ("a folder/drafter", "expected the folder as a package"),
        ("package:drafter", "expected the folder as a package"),
        ("..drafter", "expected the folder as a package"),
        ("", "expected the folder as a package"),
        ("one_module.drafter", "no package 'one_module' can be imported"),
        ("half_imported.drafter", "ValueError: half_imported.__spec__ is None"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_named(
    place: str, reason: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "one_module.py").touch()
    monkeypatch.setitem(sys.modules, "half_imported", ModuleType("half_imported"))
    with pytest.raises(CheckpointError) as error:
        InstalledDrafter("d", "the-drafters", place).folder()
    for text in (f"got {place!r}", reason, "install the-drafters again"):
        assert text in str(error.value)
    assert "\n" not in str(error.value)
