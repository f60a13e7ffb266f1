# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that answers were made with is the one that later commands use."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_mtp import engine
from vllm_mtp.cli.check import Check
from vllm_mtp.cli.init import Init
from vllm_mtp.errors import MTPError
from vllm_mtp.training import run

MADE_WITH = SimpleNamespace(engine=SimpleNamespace(tokenizer_mode="mistral"))


class Asked(MTPError):
    """For a tokenizer of this mode."""


@pytest.fixture(autouse=True)
def _asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer_of(_: Path, mode: str = "auto") -> Any:
        raise Asked(mode)

    for module in (engine, run):
        monkeypatch.setattr(module, "tokenizer_of", tokenizer_of)


def test_train_uses_the_datas(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v3").touch()
    found = run.TrainingRun.__new__(run.TrainingRun)
    found.target, found._made_with = tmp_path, MADE_WITH  # type: ignore[assignment]
    found.facts = SimpleNamespace(vocab_size=9)  # type: ignore[assignment]
    with pytest.raises(Asked, match="mistral"):
        found.frequent(1)


def test_check_uses_that_of_the_data_that_the_drafter_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("a\n")
    check = Check(drafter="d", target="t", text=str(tmp_path / "texts.txt"))
    for data, mode in (
        (SimpleNamespace(generation=SimpleNamespace(settings=MADE_WITH)), "mistral"),
        (None, "auto"),
    ):
        monkeypatch.setattr(
            "vllm_mtp.sharing.provenance.read_provenance",
            lambda _, data=data: SimpleNamespace(data=data),
        )
        with pytest.raises(Asked, match=mode):
            check._rows(tmp_path)


def test_init_uses_the_flags(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a\n")
    init = Init(
        target="t",
        layers="shared:all",
        num_speculative_tokens=1,
        out="o",
        draft_vocab_size=1,
        draft_vocab_text=str(tmp_path / "texts.txt"),
        tokenizer_mode="mistral",
    )
    with pytest.raises(Asked, match="mistral"):
        init._draft_token_ids(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "tekken.json",
        "tokenizer.model.v3",
        "tokenizer.model.v11",
    ],
)
def test_files_of_tokenizers_are_known(name: str, tmp_path: Path) -> None:
    assert not engine.has_tokenizer(tmp_path)
    (tmp_path / name).touch()
    assert engine.has_tokenizer(tmp_path)
