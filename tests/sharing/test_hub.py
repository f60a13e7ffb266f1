# SPDX-License-Identifier: Apache-2.0
"""Saving a whole folder, and what of it is sent to the hub. No network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, RepoUrl

from tests.sharing.conftest import HOME
from vllm_mtp import load_drafter, push_to_hub, save_pretrained
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import CheckpointError, DataError, MTPError
from vllm_mtp.evaluation.offline import OfflineResult
from vllm_mtp.sharing import hub
from vllm_mtp.sharing.folder import refresh_card
from vllm_mtp.sharing.provenance import DrafterProvenance, read_provenance

ALLOWED = [
    "README.md", "acceptance.png", "config.json", "evaluation.json",
    "model.safetensors", "probe.safetensors", "provenance.json",
]  # fmt: skip


class FakeHub:
    """Stands where `HfApi` stands; keeps what it was sent."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sent: dict[str, bytes] = {}
        self.given: dict[str, Any] = {}
        self.error: Exception | None = None

    def __call__(self, token: str | None = None) -> "FakeHub":
        self.given["token"] = token
        return self

    def create_repo(self, repo_id: str, **given: Any) -> RepoUrl:
        self.calls.append("create_repo")
        if self.error is not None:
            raise self.error
        self.given |= given
        owned = repo_id if "/" in repo_id else f"jane/{repo_id}"
        return RepoUrl(f"https://huggingface.co/{owned}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(f"create_branch {repo_id} {branch}")

    def create_commit(
        self, repo_id: str, operations: list[CommitOperationAdd], **given: Any
    ) -> None:
        self.calls.append(f"create_commit {repo_id}")
        self.given |= given
        for operation in operations:
            with operation.as_file() as file:
                self.sent[operation.path_in_repo] = file.read()


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


@pytest.fixture
def whole(
    drafter: Drafter,
    folder: Path,
    provenance: DrafterProvenance,
    evaluation: OfflineResult,
) -> Path:
    """A folder with everything, and with much that nobody shall see."""
    save_pretrained(drafter, folder, provenance=provenance, evaluation=evaluation)
    for name in ("probe.safetensors", "acceptance.png", "optimizer.pt", "log.txt"):
        (folder / name).write_bytes(name.encode())
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def test_saving_writes_all_and_leaves_the_drafter(
    drafter: Drafter,
    folder: Path,
    provenance: DrafterProvenance,
    evaluation: OfflineResult,
) -> None:
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    mode = drafter.training
    save_pretrained(drafter, folder, provenance=provenance, evaluation=evaluation)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "evaluation.json", "model.safetensors",
        "provenance.json",
    ]  # fmt: skip
    after = drafter.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value)
        assert after[name].dtype == value.dtype
    assert drafter.training == mode
    for path in folder.iterdir():
        assert HOME.encode() not in path.read_bytes()
    stored = OfflineResult.from_json((folder / "evaluation.json").read_bytes())
    assert stored.by_category == evaluation.by_category
    assert load_drafter(folder).config == drafter.config


def test_papers_of_other_weights_do_not_stay(whole: Path, drafter: Drafter) -> None:
    save_pretrained(drafter, whole)
    left = {path.name for path in whole.iterdir()}
    assert not left & {"evaluation.json", "provenance.json", "acceptance.png"}
    assert "Not measured" in (whole / "README.md").read_text()


def test_a_persons_card_stays(whole: Path, drafter: Drafter) -> None:
    (whole / "README.md").write_text("# Mine")
    save_pretrained(drafter, whole)
    refresh_card(whole)
    assert (whole / "README.md").read_text() == "# Mine"


def test_a_new_evaluation_reaches_the_card(
    drafter: Drafter, folder: Path, evaluation: OfflineResult
) -> None:
    save_pretrained(drafter, folder, license="mit")
    (folder / "evaluation.json").write_text(evaluation.to_json())
    refresh_card(folder)
    text = (folder / "README.md").read_text()
    assert "acceptance length 1.900" in text
    assert "license: mit" in text, "kept"


def test_exactly_the_allowed_files_are_sent(whole: Path, fake_hub: FakeHub) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    # As `vllm-mtp eval --out` writes it, with what the user typed.
    typed = whole / "evaluation.json"
    typed.write_text(typed.read_text().replace('"out"', f'"{HOME}/out"'))
    assert HOME in typed.read_text()
    address = push_to_hub(whole, "name", private=True, token="secret", revision="v2")
    assert address == "https://huggingface.co/jane/name"
    assert fake_hub.calls == [
        "create_repo", "create_branch jane/name v2", "create_commit jane/name",
    ]  # fmt: skip
    assert sorted(fake_hub.sent) == ALLOWED
    assert fake_hub.given == {
        "token": "secret", "private": True, "exist_ok": True, "revision": "v2",
        "commit_message": "Upload drafter",
    }  # fmt: skip
    for name in ("config.json", "model.safetensors", "probe.safetensors"):
        assert fake_hub.sent[name] == before[whole / name]
    assert all(HOME.encode() not in content for content in fake_hub.sent.values())
    assert '"model":"jane/name"' in fake_hub.sent["README.md"].decode()
    sent = json.loads(fake_hub.sent["provenance.json"])
    stored = read_provenance(whole)
    assert stored is not None
    assert sent == stored.model_dump(mode="json")
    assert (whole / "README.md").read_bytes() == before[whole / "README.md"]


def test_a_bare_drafter_gets_a_card(
    drafter: Drafter, folder: Path, fake_hub: FakeHub
) -> None:
    hub.save_pretrained(drafter, folder.with_name("bare"), push_to_hub=True)
    (folder.with_name("bare") / "README.md").unlink()
    push_to_hub(folder.with_name("bare"), "jane/bare")
    assert sorted(fake_hub.sent) == ["README.md", "config.json", "model.safetensors"]
    assert fake_hub.calls == ["create_repo", "create_commit jane/bare"] * 2


def _damage(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def _named_by_path(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["target"]["name"] = f"{HOME}/model"
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (_damage("model.safetensors", "no"), CheckpointError, "model.safetensors"),
        (_damage("config.json", "{}"), CheckpointError, "config.json"),
        (_damage("provenance.json", "{}"), CheckpointError, "provenance.json"),
        (_damage("evaluation.json", "{}"), DataError, "evaluation.json"),
        (_named_by_path, CheckpointError, "target.name"),
    ],
)
def test_a_broken_folder_is_refused_before_any_network(
    damage: Callable[[Path], Any],
    error: type[MTPError],
    text: str,
    whole: Path,
    fake_hub: FakeHub,
) -> None:
    damage(whole)
    with pytest.raises(error, match=text):
        push_to_hub(whole, "jane/name")
    assert fake_hub.calls == []


def test_a_name_that_is_none_is_refused(whole: Path, fake_hub: FakeHub) -> None:
    with pytest.raises(MTPError, match="repo_id: got 'a/b/c'"):
        push_to_hub(whole, "a/b/c")
    assert fake_hub.calls == []


def test_the_hubs_refusal_is_an_error_of_ours(whole: Path, fake_hub: FakeHub) -> None:
    fake_hub.error = OSError("401 Unauthorized")
    with pytest.raises(MTPError, match="401 Unauthorized.*hf auth login"):
        push_to_hub(whole, "jane/name")


def test_settings_for_no_upload_are_refused(drafter: Drafter, folder: Path) -> None:
    with pytest.raises(MTPError, match="repo_id, private: only used with push_to_hub"):
        save_pretrained(drafter, folder, repo_id="a/b", private=True)
    assert not folder.exists()


def test_saving_can_upload(drafter: Drafter, folder: Path, fake_hub: FakeHub) -> None:
    save_pretrained(drafter, folder, push_to_hub=True, repo_id="jane/d", private=True)
    assert fake_hub.calls == ["create_repo", "create_commit jane/d"]
    assert fake_hub.given["private"] is True
