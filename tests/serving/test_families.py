# SPDX-License-Identifier: Apache-2.0
"""Every family that is said to work, from `init` to served, beside the target alone.

Families whose code in vLLM imports torchvision run in a process of their own, as
`vision/torchvision` says, and on V1 so do those that vLLM takes from transformers.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm.model_executor.models.llama import LlamaMLP, LlamaModel

from tests.nested_pytest import ROOT, run_pytest
from tests.serving.engines import ON_V2, Run, engine, generate, runner_of
from tests.serving.host_syncs import watch_propose
from tests.serving.test_host_syncs import host_tensors
from tests.tiny_answers import write_answers
from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.families import FAMILIES, Family, Own, Served
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
VISION = ROOT / ".venv" / "vision"
# Whether this is the process apart, whose vLLM finds torchvision.
SEES = os.environ.get("MTP_TESTS_SEE") == "1"
NEED_TORCHVISION = {
    *("qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "glm_ocr"),
    *("gemma3_mm", "llava", "mistral3", "muse_glimmer"),
}
# vLLM changes transformers' classes for good where it takes a model from there, so that
# tests of the torch host behind these would fail. On V2 there are none in the process.
OF_TRANSFORMERS = {"olmo3", "smollm3", "seed_oss"}
APART = NEED_TORCHVISION if ON_V2 else NEED_TORCHVISION | OF_TRANSFORMERS
HYBRIDS = {"qwen3_next", "qwen3_5", "qwen3_5_moe"}
# vLLM's linear attention on CPUs computes in bfloat16 alone, and its prefix cache of
# states needs Triton.
OF_HYBRIDS = {"dtype": "bfloat16", "enable_prefix_caching": False}
# Logits of a tiny target in bfloat16 are of this precision; MoE layers, in which a tie
# changes the experts of a token, are farther off.
TIE_MARGIN = {"qwen3_5": 0.13, "qwen3_5_moe": 0.6, "qwen3_next": 0.6}
# What other files try in every run, or what another family here does as well.
SLOW = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}
# The others are slow on V2, all that see among them.
ON_V2_IN_EVERY_RUN = {"gemma4", "gpt_oss", "glm4_moe", "olmo3", "qwen3_next"}
K = 3
MAX_TOKENS = 12 if ON_V2 else 32
PROMPTS = [[(37 * i + 11 * n) % 500 for i in range(n)] for n in (62, 33, 5)]


class Case(NamedTuple):
    """A tiny target that stands for a family."""

    target: str
    family: Family

    @property
    def layers(self) -> str:
        return "shared:all" if self.family.shared else "own:1,3"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(OF_HYBRIDS) if self.target in HYBRIDS else {}


def is_slow(name: str) -> bool:
    return name not in ON_V2_IN_EVERY_RUN if ON_V2 else name in SLOW


def cases() -> list[Any]:
    """Those that this process can run."""
    on_v2 = {Served.EXACT, Served.TIES}
    return [
        pytest.param(
            Case(name, family),
            id=name,
            marks=pytest.mark.slow if is_slow(name) else (),
        )
        for family in FAMILIES
        for name in family.tested
        if (family.v2 if ON_V2 else family.v1) in on_v2 and (name in APART) is SEES
    ]


@pytest.mark.parametrize("case", cases())
def test_from_init_to_served(
    case: Case,
    tiny_targets: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target, out = tiny_targets[case.target], tmp_path / "drafter"
    flags = ["--target", str(target), "--num-speculative-tokens", str(K)]
    flags += ["--layers", case.layers, "--dtype", "float32"]
    if "own" in case.layers:
        flags += ["--own-init", "random"]
    assert main(["init", *flags, "--out", str(out)]) == 0
    if not ON_V2:
        # Before any engine, as in its own process: vLLM's Transformers backend changes
        # transformers' classes for good.
        trained = train(target, case, tmp_path)
        capfd.readouterr()
        code = main(["check", str(trained), "--target", str(target)])
        printed = capfd.readouterr().out
        assert code == 0, printed
        assert "PASSED: files, facts, target, torch, vLLM agree" in printed
    with engine(target, None, **case.settings) as llm:
        alone = ask(llm)
    with engine(target, spec_of(out), **case.settings) as llm:
        served = ask(llm)
    assert differences(alone, served, TIE_MARGIN.get(case.target, 0.0)) == []
    assert served.counts.drafts > 10
    if case.family.shared:
        # The first draft of a drafter that is the target is the target's next token.
        assert served.counts.accepted_per_position[0] == served.counts.drafts


# Every form that a copy can have, and both ways to rotate; the others are slow.
COPIES = {"gemma4", "olmo3", "cohere2", "glm4", "exaone4"}


@pytest.mark.skipif(ON_V2, reason="one runner is enough")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COPIES or SEES else pytest.mark.slow)
        for family in FAMILIES
        for name in family.tested
        if family.own is Own.COPY and family.shared and (name in APART) is SEES
    ],
)
def test_copies_of_all_layers_are_the_target(
    name: str, tiny_targets: dict[str, Path], tmp_path: Path
) -> None:
    """Also in vLLM, by its RoPE and its cache."""
    target, out = tiny_targets[name], tmp_path / "drafter"
    flags = ["--num-speculative-tokens", "1", "--dtype", "float32"]
    command = [
        "init",
        "--target",
        str(target),
        "--layers",
        "own:all",
        "--out",
        str(out),
    ]
    if name in OF_TRANSFORMERS:
        # Another test here has run the target in vLLM before.
        run = "import sys; from vllm_mtp.cli.main import main; sys.exit(main())"
        subprocess.run([sys.executable, "-c", run, *command, *flags], check=True)
    else:
        assert main([*command, *flags]) == 0
    with engine(target, spec_of(out)) as llm:
        counts = ask(llm).counts
    # Two tokens can be as likely, up to rounding.
    assert counts.accepted_per_position[0] >= counts.drafts - 1 > 10


@pytest.mark.skipif(ON_V2 or SEES, reason="one runner is enough")
def test_rope_by_overrides(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    target, drafter = tiny_targets["llama"], tiny_drafter("llama", "shared-4")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    overrides = {"rope_parameters": yarn | {"original_max_position_embeddings": 64}}
    runs = []
    for spec in (None, spec_of(drafter)):
        with engine(target, spec, hf_overrides=overrides) as llm:
            runs.append(ask(llm))
    with engine(target) as llm:
        plain = ask(llm)
    alone, served = runs
    assert differences(alone, served, 0.0) == []
    assert alone.token_ids[0] != plain.token_ids[0]
    assert served.counts.accepted_per_position[0] == served.counts.drafts > 10


class TestMadeUpFamily:
    """Names and shapes of Llama, and something that no list of names would say."""

    SHARED = "shared-4"

    @pytest.fixture(autouse=True)
    def _here(self) -> None:
        if ON_V2 or SEES:
            pytest.skip("one runner is enough")

    def test_a_twist_inside_a_layer_is_drafted_exactly(
        self,
        tiny_targets: dict[str, Path],
        tiny_drafter: Callable[[str, str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        forward = LlamaMLP.forward
        monkeypatch.setattr(LlamaMLP, "forward", lambda *args: forward(*args) * 0.5)
        target, drafter = tiny_targets["llama"], tiny_drafter("llama", self.SHARED)
        with engine(target) as llm:
            alone = ask(llm)
        with engine(target, spec_of(drafter)) as llm:
            served = ask(llm)
        assert served.token_ids == alone.token_ids
        assert served.counts.accepted_per_position[0] == served.counts.drafts > 10
        monkeypatch.undo()
        with engine(target) as llm:
            assert ask(llm).token_ids != alone.token_ids

    def test_a_scaled_stream_between_layers_is_refused(
        self,
        tiny_targets: dict[str, Path],
        tiny_drafter: Callable[[str, str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        make = LlamaModel.__init__

        def twisted(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            self.layers[2].register_forward_pre_hook(
                # As the model calls it; by itself it is called by names.
                lambda _, args: (
                    (args[0], args[1] * 0.5, args[2] * 0.5) if args else args
                )
            )

        monkeypatch.setattr(LlamaModel, "__init__", twisted)
        target, drafter = tiny_targets["llama"], tiny_drafter("llama", self.SHARED)
        with engine(target) as llm:
            ask(llm)  # vLLM serves it
        wrong = "rows between its layers 1 and 2 differ by 1"
        with (
            pytest.raises(UnsupportedTargetError, match=wrong),
            engine(target, spec_of(drafter)),
        ):
            pass


@pytest.mark.skipif(not ON_V2, reason="graphs are V2's")
@pytest.mark.parametrize("case", cases())
def test_graphs_and_waiting_on_v2(
    case: Case,
    tiny_targets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a graph would hold drafts the same, and nothing waits for the device."""
    from tests.serving.played_graphs import play_graphs

    target, out = tiny_targets[case.target], tmp_path / "drafter"
    options = DrafterOptions(dtype="float32", own_init="random")
    save_drafter(new_drafter(target, case.layers, K, options), out)
    spec = spec_of(out) | {"enforce_eager": False}
    with engine(target, spec, **case.settings) as llm:
        speculator = runner_of(llm).speculator
        propose = speculator.propose
        waits, sizes = watch_propose(speculator, host_tensors)
        eager = generate(llm, PROMPTS, 6)
        speculator.propose = propose
        llm.reset_prefix_cache()
        played = play_graphs(speculator, num_reqs=(1, 2, 4), monkeypatch=monkeypatch)
        graphed = generate(llm, PROMPTS, 6)
    assert waits == []
    assert max(sizes) == len(PROMPTS)
    assert graphed.token_ids == eager.token_ids
    assert graphed.counts == eager.counts
    assert played


# What follows an image with many tokens and few positions.
IMAGE, SHORTER = range(10, 30), 15


@pytest.mark.skipif(not SEES, reason="needs torchvision")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_positions_behind_an_image(
    name: str,
    tiny_targets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of each prompt gets the positions of an image's patches."""
    target = tiny_targets[name]
    layers = "own:1,3" if name in HYBRIDS else "shared:all"
    options = DrafterOptions(dtype="float32", own_init="random")
    save_drafter(new_drafter(target, layers, K, options), tmp_path / "drafter")
    settings = dict(OF_HYBRIDS) if name in HYBRIDS else {}
    alone, served, texts = [], [], []
    for spec, runs in ((None, alone), (spec_of(tmp_path / "drafter"), served)):
        with engine(target, spec, **settings) as llm:
            texts.append(ask(llm))
            llm.reset_prefix_cache()
            model = runner_of(llm).get_model()
            monkeypatch.setattr(model, MROPE, positions_with_image, raising=False)
            # The same slots of the batch get other offsets, one request after another.
            for prompts in IN_TURN:
                runs.append(generate(llm, prompts, MAX_TOKENS))
                llm.reset_prefix_cache()
    margin = TIE_MARGIN.get(name, 0.0)
    for one, other in zip(alone, served, strict=True):
        assert differences(one, other, margin) == []
        if layers == "shared:all":
            assert other.counts.accepted_per_position[0] == other.counts.drafts > 3
    assert alone[0].token_ids[0] != texts[0].token_ids[0]
    assert served[2].token_ids == [texts[1].token_ids[2]]  # it has no image


MROPE = "get_mrope_input_positions"
IN_TURN = (PROMPTS[:1], PROMPTS[1:2], PROMPTS[2:], PROMPTS)


def positions_with_image(tokens: Sequence[int], *_: Any, **__: Any) -> tuple[Any, int]:
    """Positions on three axes, and what is added to those behind the prompt."""
    axes = torch.arange(len(tokens)).repeat(3, 1)
    if len(tokens) <= IMAGE.stop:
        return axes, 0
    shorter = SHORTER if len(tokens) > 40 else SHORTER // 2
    patches = torch.arange(len(IMAGE))
    axes[0, IMAGE.start : IMAGE.stop] = IMAGE.start
    axes[1, IMAGE.start : IMAGE.stop] = IMAGE.start + patches // 5
    axes[2, IMAGE.start : IMAGE.stop] = IMAGE.start + patches % 5
    axes[:, IMAGE.stop :] -= shorter
    return axes, -shorter


def ask(llm: Any) -> Run:
    return generate(llm, PROMPTS, MAX_TOKENS)


def spec_of(drafter: Path) -> dict[str, Any]:
    return {"method": "mtp_placeholder", "model": str(drafter)}


def differences(alone: Run, other: Run, tie_margin: float) -> list[str]:
    """Where answers part, but for ties of two tokens."""
    found = []
    for row, answers in enumerate(zip(alone.token_ids, other.token_ids, strict=True)):
        parted = [
            i for i, pair in enumerate(zip(*answers, strict=True)) if len({*pair}) > 1
        ]
        if not parted:
            continue
        place = parted[0]
        one, two = (answer[place] for answer in answers)
        scores = alone.logprobs[row][place]
        if two not in scores or scores[one].logprob - scores[two].logprob > tie_margin:
            found.append(f"answer {row}, token {place}: {one}, got {two}")
    return found


def train(target: Path, case: Case, folder: Path) -> Path:
    """A few steps of training on made-up answers; the drafter's folder."""
    data, out = folder / "answers", folder / "trained"
    texts = [prompt + PROMPTS[1][:20] for prompt in PROMPTS]
    write_answers(data, target, texts, [len(prompt) for prompt in PROMPTS])
    flags = {
        "target": str(target),
        "data": str(data),
        "output-dir": str(out),
        "layers": case.layers,
        **({"own-init": "random"} if "own" in case.layers else {}),
        "num-speculative-tokens": str(K),
        "dtype": "float32",
        "bf16": str(case.target in HYBRIDS),
        "max-steps": "3",
        "per-device-train-batch-size": "1",
        "anchors-per-text": "8",
        "report-to": "none",
        "use-cpu": "true",
    }
    command = [part for name, value in flags.items() for part in (f"--{name}", value)]
    assert main(["train", *command]) == 0
    return out


@pytest.mark.skipif(SEES, reason="is one of those")
@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_families_apart(which: str, tmp_path: Path) -> None:
    """In a process of their own, whose vLLM finds torchvision."""
    if (which == "slow") is not ON_V2:
        pytest.skip("on V1 none is slow, on V2 all are")
    assert VISION.is_dir(), "`make setup` puts torchvision there"
    path = [str(HERE / "vision"), str(VISION), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "MTP_TESTS_SEE": "1",
    }
    report = run_pytest(["-m", which, __file__], environment, tmp_path, 900)
    if not report.is_good:
        pytest.fail(str(report), pytrace=False)
    print(report)
