# SPDX-License-Identifier: Apache-2.0
"""How a drafter was made, from a run's settings to ``provenance.json``."""

import json
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.sharing.conftest import HOME
from tests.tiny_answers import MakeArguments
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.unseen import TrainingPrompts
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import CheckpointError
from vllm_mtp.sharing.made_with import device_name, git_state, versions
from vllm_mtp.sharing.provenance import (
    DrafterProvenance,
    ParentRecord,
    parent_record,
    read_provenance,
    target_record,
    training_prompts,
    untrained,
    without_paths,
)
from vllm_mtp.torch_host.new_drafter import new_drafter
from vllm_mtp.training.record import RunInfo, publish_run, told_arguments


def test_a_run_leaves_its_papers(
    arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
) -> None:
    parent = save_drafter(new_drafter(tiny_llama, "own:1", 2), tmp_path / "parent")
    args = arguments(
        layers="own:1", kl_weight=0.5, warm_start=str(parent), adam_beta2=0.9
    )
    out = save_drafter(new_drafter(tiny_llama, "own:1", 3), str(args.output_dir))
    (out / "evaluation.json").write_text("of the weights before")
    started = datetime.now(timezone(timedelta(hours=5)))
    publish_run(
        RunInfo(args=args, target=tiny_llama, started=started, optimizer_steps=4)
    )

    found = read_provenance(out)
    assert found is not None
    assert found.training is not None
    assert found.data is not None
    told = found.training.arguments
    assert (told["layers"], told["kl_weight"], told["seed"]) == ("own:1", 0.5, 42)
    assert told["adam_beta2"] == 0.9
    assert found.training.started.tzinfo == timezone.utc
    assert abs(found.training.started - started) < timedelta(seconds=1)
    assert found.training.optimizer_steps == 4
    assert found.data.name == "data"
    assert found.data.generation.settings.source.prompts == "made.jsonl"
    assert (found.target.name, found.target.revision) == (tiny_llama.name, None)
    assert found.parent == parent_record(parent, "parent")
    assert str(tmp_path) not in (out / "provenance.json").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert not (out / "evaluation.json").exists()


def test_only_what_matters_of_the_settings_is_told(arguments: MakeArguments) -> None:
    args = arguments(run_name="jane's run", optim_args=f"file={HOME}/x")
    args.hub_token = "hf_secret"  # which `train` refuses
    told = told_arguments(args)
    assert told["optim_args"] == "file=x"
    assert "jane" not in json.dumps(told)
    assert "secret" not in json.dumps(told)
    assert not {"target", "data", "output_dir", "report_to", "use_cpu"} & set(told)
    assert told["lr_scheduler_type"] == "cosine"


def test_no_path_survives(provenance: DrafterProvenance) -> None:
    assert HOME in provenance.to_json()
    clean = without_paths(provenance)
    assert HOME not in clean.to_json()
    assert clean.data is not None
    assert clean.data.generation.settings.source.prompts == "prompts.jsonl"
    assert DrafterProvenance.model_validate_json(clean.to_json()) == clean


def test_target_of_the_hub_has_a_revision(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0a1b2c"
    shutil.copytree(tiny_llama, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    record = target_record(TargetFacts.from_folder(tiny_llama), snapshot, "owner/name")
    assert (record.name, record.revision) == ("owner/name", "0a1b2c")
    assert record.license == "mit"


def test_untrained_drafter(tiny_llama: Path) -> None:
    config = new_drafter(tiny_llama, "own:0", 2).config
    record = untrained(config, tiny_llama, str(tiny_llama))
    assert (record.training, record.data, record.parent) == (None, None, None)
    assert record.target.weights_fingerprint == config.target.weights_fingerprint


def test_a_file_of_an_earlier_version_is_read(
    provenance: DrafterProvenance, tmp_path: Path
) -> None:
    values = json.loads(provenance.to_json())
    assert "labels_seen" not in values["training"]
    assert values.pop("more_data") == []
    for count in (None, 1234567):
        values["training"]["labels_seen"] = count
        (tmp_path / "provenance.json").write_text(json.dumps(values))
        assert read_provenance(tmp_path) == provenance


def test_broken_file_is_named(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None
    (tmp_path / "provenance.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match=r"provenance\.json: not a provenance"):
        read_provenance(tmp_path)


def parent_told(folder: Path) -> float | None:
    """What a run that goes on from it will say of it."""
    (folder / "config.json").write_text("{}")
    return parent_record(folder, folder.name).held_out


class TestTrainingPrompts:
    """What a folder tells of the prompts behind it."""

    def told(self, folder: Path, record: DrafterProvenance) -> TrainingPrompts:
        folder.mkdir()
        (folder / "provenance.json").write_text(record.to_json())
        return training_prompts(folder)

    def test_sharegpt_in_one_run(
        self, folder: Path, provenance: DrafterProvenance
    ) -> None:
        record = json.loads(provenance.to_json()) | {"parent": None}
        source = {"prompts": "sharegpt", "skip": 100, "limit": 50}
        record["data"]["generation"]["settings"]["source"] |= source
        found = self.told(folder, DrafterProvenance.model_validate(record))
        assert found == TrainingPrompts(
            folder.name, 0.1, (SourceSettings.model_validate(source),)
        )

    @pytest.mark.parametrize(
        ("prompts", "read"),
        [
            ("sharegpt:later", ("sharegpt:later",)),
            ("sharegpt:tasks", ("sharegpt:tasks",)),
            ("self:40", ()),  # nobody asked these in ShareGPT
            ("mine.jsonl", None),  # which may hold any text
            ("hf:org/name", None),
        ],
    )
    def test_what_was_read_of_sharegpt(
        self,
        prompts: str,
        read: tuple[str, ...] | None,
        folder: Path,
        provenance: DrafterProvenance,
    ) -> None:
        record = json.loads(provenance.to_json()) | {"parent": None}
        record["data"]["generation"]["settings"]["source"] = {"prompts": prompts}
        found = self.told(folder, DrafterProvenance.model_validate(record))
        expected = read and tuple(SourceSettings(prompts=name) for name in read)
        assert found == TrainingPrompts(folder.name, 0.1, expected)

    def test_another_source_has_no_numbers(
        self, folder: Path, provenance: DrafterProvenance
    ) -> None:
        alone = provenance.model_copy(update={"parent": None})
        assert self.told(folder, alone) == TrainingPrompts(folder.name, 0.1)

    def test_of_a_chain_only_the_split_is_known(
        self, folder: Path, provenance: DrafterProvenance
    ) -> None:
        found = self.told(folder, provenance)
        assert found == TrainingPrompts(folder.name, 0.1, None, assumed=True)
        assert parent_told(folder) is None, "nobody knows what the first run held out"

    @pytest.mark.parametrize(("before", "least"), [(0.04, 0.04), (0.5, 0.1), (1, 0.1)])
    def test_the_least_of_a_chain_that_is_told(
        self, before: float, least: float, folder: Path, provenance: DrafterProvenance
    ) -> None:
        parent = ParentRecord(name="p", config_sha256="f" * 64, held_out=before)
        found = self.told(folder, provenance.model_copy(update={"parent": parent}))
        assert found == TrainingPrompts(folder.name, least)
        assert parent_told(folder) == least

    def test_untrained(self, folder: Path, provenance: DrafterProvenance) -> None:
        bare = provenance.model_copy(update={"data": None, "parent": None})
        assert self.told(folder, bare) == TrainingPrompts(folder.name, 1.0)

    def test_no_papers(self, folder: Path) -> None:
        assert training_prompts(folder) == TrainingPrompts(folder.name, None)


def test_versions_and_device_name_nobody() -> None:
    assert {"python", "torch", "transformers", "vllm_mtp"} <= set(versions())
    assert device_name("cpu").startswith("cpu (")
    assert device_name("cpu", 2).endswith(" x 2")


def test_commit_is_the_packages_own(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    assert git_state(package) is None

    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        subprocess.run(["git", *who, *words], cwd=package, check=True)

    git("init", "-q", "..")
    assert git_state(package) is None, "no commit yet"
    (package / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    state = git_state(package)
    assert state is not None
    assert not state.changed
    (package / "a.py").write_text("2")
    changed = git_state(package)
    assert changed is not None
    assert (changed.sha, changed.changed) == (state.sha, True)
    # Installed into an environment inside the checkout: not this commit's files.
    assert git_state(tmp_path / "checkout" / "venv" / "package") is None
