# SPDX-License-Identifier: Apache-2.0
"""An adapter that peft trained on noise rows, imported and served."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.auto import AutoModelForCausalLM

from tests.peft_rows import ALL_MODULES, noise_logits, save_adapter
from tests.serving.engines import engine, generate
from tests.tiny_answers import write_answers
from tests.tiny_targets import VOCAB_SIZE, make_tiny
from vllm_mtp.cli.main import main

pytestmark = pytest.mark.engine

PERIOD, K = 8, 4
TEXTS, LENGTH = 16, 33


class Counting:
    """Texts that count from 0 to 7 and begin again, at random places."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def texts(self, length: int) -> torch.Tensor:
        """``[TEXTS, length]`` int64."""
        first = torch.randint(PERIOD, (TEXTS, 1), generator=self.random)
        return (first + torch.arange(length)) % PERIOD

    def others(self, *shape: int) -> torch.Tensor:
        """Tokens of the whole vocabulary but its first."""
        return torch.randint(1, VOCAB_SIZE, shape, generator=self.random)


def train(model: torch.nn.Module, rate: float, steps: int, loss_of: object) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    for _ in range(steps):
        loss = loss_of()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def counting_target(folder: Path) -> Path:
    """A target that counts. Some of the tokens that it learnt from were wrong, so it
    looks further back than at the last one."""
    make_tiny("llama", folder, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.02, generator=torch.manual_seed(0))
    data = Counting()

    def loss() -> torch.Tensor:
        texts = data.texts(LENGTH)
        wrong = torch.rand(texts.shape, generator=data.random) < 0.05
        seen = torch.where(wrong, data.others(*texts.shape), texts)[:, :-1]
        return F.cross_entropy(model(seen).logits.flatten(0, 1), texts[:, 1:].flatten())

    train(model, 3e-3, 60, loss)
    model.save_pretrained(folder)
    return folder


def adapter_of(model: torch.nn.Module) -> PeftModel:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=ALL_MODULES)
    return get_peft_model(model.requires_grad_(False), config)  # type: ignore[arg-type]


def learn_to_draft(adapted: PeftModel) -> None:
    """As Uno is trained: noise rows behind a seed, LoRA on them alone."""
    data = Counting()

    def loss() -> torch.Tensor:
        length = int(torch.randint(3, 30, (1,), generator=data.random))
        texts = data.texts(length + K)
        noise = data.others(TEXTS, K - 1)
        logits = noise_logits(adapted, texts[:, :length], noise)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), texts[:, length + 1 :].flatten())

    train(adapted, 5e-3, 120, loss)


def test_what_peft_trained_drafts_better_than_what_it_did_not(tmp_path: Path) -> None:
    target = counting_target(tmp_path / "target")
    adapted = adapter_of(AutoModelForCausalLM.from_pretrained(target))
    for name in ("untrained", "trained"):
        if name == "trained":
            learn_to_draft(adapted)
        adapted.save_pretrained(tmp_path / name)
        command = ["import", str(tmp_path / name), "--target", str(target)]
        command += ["--num-speculative-tokens", str(K), "--out"]
        assert main([*command, str(tmp_path / f"{name}-drafter")]) == 0

    prompts = [[(n + i) % PERIOD for i in range(10 + 3 * n)] for n in range(4)]
    with engine(target) as llm:
        alone = generate(llm, prompts).token_ids
    accepted = {}
    for name in ("untrained", "trained"):
        folder = str(tmp_path / f"{name}-drafter")
        spec = {"method": "mtp_placeholder", "model": folder}
        with engine(target, spec) as llm:
            run = generate(llm, prompts)
        assert run.token_ids == alone
        # The seed row runs on base weights: its draft is the target's own token.
        assert run.counts.accepted_per_position[0] == run.counts.drafts
        accepted[name] = run.counts.acceptance_per_position
    better = zip(accepted["untrained"][1:], accepted["trained"][1:], strict=True)
    assert all(trained > 0.2 + untrained for untrained, trained in better), accepted


def test_vllm_computes_what_an_adapter_gives_where_keys_are_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 4: scaled embeddings, heads that differ, and layers without a v_proj."""
    target = make_tiny("gemma4", tmp_path / "target")
    save_adapter(target, tmp_path / "adapter")
    drafter = ["--target", str(target)]
    command = ["import", str(tmp_path / "adapter"), *drafter, "--out"]
    drafter.insert(0, str(tmp_path / "drafter"))
    assert main([*command, drafter[0], "--num-speculative-tokens", str(K)]) == 0
    texts = [[(37 * i + 11 * n) % VOCAB_SIZE for i in range(24)] for n in range(4)]
    data = write_answers(tmp_path / "data", target, texts, [6] * len(texts))
    assert main(["check", *drafter, "--record", "--data", str(data)]) == 0
    assert main(["check", *drafter]) == 0
    assert "PASSED: files, facts, target, torch, vLLM agree" in capsys.readouterr().out
