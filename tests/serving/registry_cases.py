# SPDX-License-Identifier: Apache-2.0
"""Cases for a vLLM with a registry of methods; `test_registry.py` runs them with it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from tests.serving.engines import ON_V2, engine, generate, runner_of
from vllm_mtp.cli import doctor
from vllm_mtp.errors import MTPError
from vllm_mtp.serving import ledger

pytestmark = pytest.mark.skipif(
    ledger.vllm_registry() is None, reason="needs test_registry.py's vLLM"
)

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]
MAX_TOKENS = 8 if ON_V2 else 24


@pytest.fixture(scope="module")
def alone(tiny_targets: dict[str, Path]) -> list[list[int]]:
    with engine(tiny_targets["llama"]) as llm:
        return generate(llm, PROMPTS, MAX_TOKENS).token_ids


def applied() -> set[str]:
    return {patch.name for patch in ledger.PATCHES if ledger.is_installed(patch)}


def test_it_is_exact_and_only_a_repair_is_patched(
    alone: list[list[int]],
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", "mixed"))}
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, MAX_TOKENS)
        with pytest.raises(VLLMValidationError, match="ask for logprobs"):
            generate(llm, PROMPTS[:1], 4, logprobs=None, logprob_token_ids=[3])
        runner = runner_of(llm)
        ours = runner.speculator if ON_V2 else runner.drafter
        assert type(ours).__module__ == f"vllm_mtp.serving.{'v2' if ON_V2 else 'v1'}"
        if not ON_V2:  # whose interpreter knows no top-k
            sampled = generate(llm, PROMPTS, 4, temperature=1.0, top_k=1, logprobs=None)
            assert sampled.token_ids == [ids[:4] for ids in alone]
            assert_only_drafts_are_verified(llm, monkeypatch)
    assert run.token_ids == alone
    assert 0 < run.counts.accepted_tokens < run.counts.draft_tokens
    assert applied() == {"cpu-sampling"}


def assert_only_drafts_are_verified(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``v1-no-drafts`` is for elsewhere."""
    from vllm.v1.sample import rejection_sampler

    verify, steps = rejection_sampler.rejection_sample, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return verify(*args, **kwargs)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", counted)
    generate(llm, PROMPTS, 6, extra_args={"num_speculative_tokens": 0})
    assert not steps
    generate(llm, PROMPTS, 6)
    assert steps


def config_for(target: Path, **settings: Any) -> Any:
    args = EngineArgs(
        model=str(target), skip_tokenizer_init=True, speculative_config=settings
    )
    return args.create_engine_config().speculative_config


def test_the_config_reaches_other_processes_with_what_they_build(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    model = str(tiny_drafter("llama", "shared-1"))
    config = config_for(tiny_targets["llama"], method="mtp_placeholder", model=model)
    twin = pickle.loads(pickle.dumps(config))
    assert type(twin).__name__ == "RegisteredSpecConfig"
    assert twin.proposer_cls.endswith("v1.MTPPlaceholderProposer")
    assert twin.takes_any_length == config.takes_any_length
    # From Python and the command line alike.
    args = EngineArgs(
        model=str(tiny_targets["llama"]),
        skip_tokenizer_init=True,
        spec_method="mtp_placeholder",
        spec_model=model,
    )
    assert type(args.create_engine_config().speculative_config) is type(config)


@pytest.mark.parametrize("wrong", [{"modle": "x"}, {"num_speculative_tokens": "4"}])
def test_a_wrong_setting_is_refused_in_one_line(
    wrong: dict[str, str], tiny_targets: dict[str, Path]
) -> None:
    (key,) = wrong
    with pytest.raises(MTPError, match=key) as refused:
        config_for(tiny_targets["llama"], method="mtp_placeholder", **wrong)
    assert "\n" not in str(refused.value)


def test_without_our_method_vllm_works_as_ever(
    alone: list[list[int]],
    tiny_targets: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tiny_targets["llama"]
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1}
    assert type(config_for(target, **ngram)) is SpeculativeConfig
    args = EngineArgs(model=str(target), skip_tokenizer_init=True)
    assert args.create_engine_config().speculative_config is None
    params = SamplingParams(logprob_token_ids=[3])
    params._validate_spec_decode(config_for(target, **ngram))
    if not ON_V2:
        with engine(target, ngram) as llm:
            run = generate(llm, PROMPTS, MAX_TOKENS)
            assert type(runner_of(llm).drafter).__name__ == "NgramProposer"
        assert run.token_ids == alone
        assert run.counts.drafts > 0
    monkeypatch.setattr("vllm.v1.spec_decode.registry._config_classes", {})
    with pytest.raises(ValueError, match="mtp_placeholder"):
        config_for(target, method="mtp_placeholder")


def test_doctor_says_what_is_not_needed() -> None:
    found = {finding.topic: finding for finding in doctor.examine()}
    for patch in ledger.PATCHES:
        finding = found[f"hook {patch.name}"]
        assert not finding.failed
        if patch is not ledger.CPU_GDN:  # which is for some releases only
            needed = not finding.text.endswith("not needed with this vLLM")
            repairs = (ledger.CPU_SAMPLING, ledger.V2_ADAPTER_ROWS, ledger.V1_THINKING)
            assert needed == (patch in repairs)
