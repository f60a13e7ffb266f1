# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters as drafters: what peft computes on noise rows, and back again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.peft_rows import ALL_MODULES, noise_logits, save_adapter
from tests.tiny_targets import FAMILIES, VOCAB_SIZE, make_tiny
from vllm_mtp.cli.main import main
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter, read_config, save_drafter
from vllm_mtp.drafter.config import DrafterConfig, SharedLayerConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts, hf_config_of
from vllm_mtp.sharing.peft_folder import CONFIG_FILE, NOISE_FILE, WEIGHTS_FILE
from vllm_mtp.sharing.provenance import read_provenance, training_prompts
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, TargetWeights, new_drafter
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts

K = 4
TEXT = torch.arange(60) * 37 % VOCAB_SIZE
PLACES = (5, 20, 55)  # the last is behind a sliding window


TRAINED: dict[str, Any] = {"placeholder_kind": "trained", "mask_token_id": None}


def import_adapter(folder: Path, target: Path, out: Path, *flags: str) -> int:
    command = ["import", str(folder), "--target", str(target), "--out", str(out)]
    if "--num-speculative-tokens" not in flags:
        command += ["--num-speculative-tokens", str(K)]
    return main([*command, *flags])


def export(drafter: Path, target: Path, out: Path) -> int:
    return main(["export", str(drafter), "--target", str(target), "--out", str(out)])


def loras(folder: Path) -> list[Any]:
    layers = read_config(folder).layers
    return [layer.lora for layer in layers if isinstance(layer, SharedLayerConfig)]


@torch.no_grad()
def our_logits(drafter: Drafter, target: Path) -> torch.Tensor:
    """``[places, K, V]``."""
    host = HFTarget(load_frozen(target, "float32", "cpu"))
    bound = BoundDrafter(drafter, host)
    blocks = TextBlocks(TEXT, host.encode(TEXT), torch.tensor(PLACES))
    exact = bound.logits(forward_texts(bound, [blocks], K))
    whole = bound.logits(forward_texts(bound, [blocks], K, whole_blocks=True))
    torch.testing.assert_close(exact, whole, atol=1e-3, rtol=1e-3)
    return whole


# Grouped queries; norms of queries and keys; scaled and tied embeddings with windows;
# embeddings scaled by the decoder; layers that differ in their heads.
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen3", "granite", "gemma4"),
        pytest.param("gemma3", marks=pytest.mark.slow),
    ],
)
def test_peft_and_we_give_equal_logits(family: str, tmp_path: Path) -> None:
    target = make_tiny(family, tmp_path / "target")
    adapted = save_adapter(target, tmp_path / "adapter")
    assert import_adapter(tmp_path / "adapter", target, tmp_path / "drafter") == 0
    drafter = load_drafter(tmp_path / "drafter")
    assert drafter.config.noise is not None
    noise = torch.tensor(drafter.config.noise.token_ids)
    with torch.no_grad():
        expected = torch.cat(
            [noise_logits(adapted, TEXT[None, : n + 1], noise[None]) for n in PLACES]
        )
        unchanged = noise_logits_without(adapted, noise)
    found = our_logits(drafter, target)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (found[:, 1:] - unchanged[:, 1:]).abs().amax(-1).min() > 0.1, "no LoRA acts"


def noise_logits_without(adapted: PeftModel, noise: torch.Tensor) -> torch.Tensor:
    with adapted.disable_adapter():
        return torch.cat(
            [
                adapted(torch.cat([TEXT[: n + 1], noise])[None]).logits[:, n:]
                for n in PLACES
            ]
        )


# In every run, those that do more than to look an embedding up, and one that does not.
EMBEDDINGS = ["llama", "gemma2", "gemma4", "gemma3_mm", "granite", "muse_glimmer"]


@pytest.mark.parametrize(
    "family",
    [
        *EMBEDDINGS,
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in sorted(set(FAMILIES) - set(EMBEDDINGS))
        ),
    ],
)
def test_noise_is_what_enters_the_targets_first_layer(
    family: str, tmp_path: Path
) -> None:
    """However a family scales or norms its embeddings, in the type that it stores."""
    ids = [1, 7, 300]
    target = make_tiny(family, tmp_path)
    whole_config = hf_config_of(target)
    rows = TargetWeights(target, TargetFacts.from_folder(target)).embeddings(
        ids, whole_config
    )
    host = HFTarget(load_frozen(target, "float32", "cpu"))
    assert rows.equal(host.embed(torch.tensor(ids)))


def test_noise_rounds_where_a_target_of_16_bits_rounds(tmp_path: Path) -> None:
    target = make_tiny("gemma3", tmp_path)
    model = load_frozen(target, "bfloat16", "cpu")
    model.save_pretrained(target)
    rows = TargetWeights(target, TargetFacts.from_folder(target)).embeddings(
        [3, 99], hf_config_of(target)
    )
    assert rows.dtype == torch.bfloat16
    assert rows.equal(HFTarget(model).embed(torch.tensor([3, 99])))


class TestConfig:
    def test_patterns_give_layers_ranks_and_scales(
        self, tiny_llama: Path, tmp_path: Path
    ) -> None:
        settings = {
            "rank_pattern": {r"layers\.1\..*": 2},
            "alpha_pattern": {r"layers\.[12]\..*": 7},
            "layers_to_transform": [0, 1, 2],
            "exclude_modules": ["up_proj", "k_proj"],
        }
        save_adapter(tiny_llama, tmp_path / "adapter", **settings)
        assert import_adapter(tmp_path / "adapter", tiny_llama, tmp_path / "d") == 0
        found = loras(tmp_path / "d")
        modules = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
        assert [(lora.rank, lora.alpha) for lora in found[:3]] == [
            (4, 12),
            (2, 7),
            (4, 7),
        ]
        assert all(lora.modules == modules for lora in found[:3])
        assert found[3] is None
        check_like_peft(tmp_path, tiny_llama)

    @pytest.mark.parametrize("modules", ["all-linear", r".*\.(q|down)_proj"])
    def test_modules_by_expression(
        self, modules: str, tiny_llama: Path, tmp_path: Path
    ) -> None:
        save_adapter(tiny_llama, tmp_path / "adapter", target_modules=modules)
        # peft writes what "all-linear" stood for.
        config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
        config["target_modules"] = modules
        (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(config))
        assert import_adapter(tmp_path / "adapter", tiny_llama, tmp_path / "d") == 0
        expected = ALL_MODULES if modules == "all-linear" else ["q_proj", "down_proj"]
        assert all(list(lora.modules) == expected for lora in loras(tmp_path / "d"))

    def test_rslora_divides_by_the_root_of_the_rank(
        self, tiny_llama: Path, tmp_path: Path
    ) -> None:
        save_adapter(tiny_llama, tmp_path / "adapter", use_rslora=True)
        assert import_adapter(tmp_path / "adapter", tiny_llama, tmp_path / "d") == 0
        assert {lora.alpha / lora.rank for lora in loras(tmp_path / "d")} == {
            12 / 4**0.5
        }
        check_like_peft(tmp_path, tiny_llama)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                {"rank_pattern": {"q_proj": 2}},
                "rank_pattern: the modules of layer 0 have [2, 4]",
            ),
            (
                {"alpha_pattern": {"q_proj": 2}},
                "alpha_pattern: the modules of layer 0 have [2.0, 12.0]",
            ),
        ],
    )
    def test_one_rank_and_scale_for_a_layer(
        self,
        changes: dict[str, Any],
        expected: str,
        tiny_llama: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        save_adapter(tiny_llama, tmp_path / "adapter", **changes)
        assert import_adapter(tmp_path / "adapter", tiny_llama, tmp_path / "d") == 1
        assert expected in refusal(capsys)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"r": 8}, "r: its pair has rank 4, the adapter's config says 8"),
            (
                {"target_modules": ALL_MODULES[1:]},
                "self_attn.q_proj and 3 more: target_modules does not name it",
            ),
            (
                {"target_modules": ALL_MODULES[:6], "layers_to_transform": [0]},
                "mlp.down_proj and ",
            ),
        ],
    )
    def test_config_and_weights_must_agree(
        self,
        changes: dict[str, Any],
        expected: str,
        tiny_llama: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        save_adapter(tiny_llama, tmp_path / "adapter")
        path = tmp_path / "adapter" / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        assert import_adapter(tmp_path / "adapter", tiny_llama, tmp_path / "d") == 1
        assert expected in refusal(capsys)
        assert not (tmp_path / "d").exists()


def check_like_peft(tmp_path: Path, target: Path) -> None:
    """The imported drafter's logits are those of the saved adapter in peft."""
    drafter = load_drafter(tmp_path / "d")
    assert drafter.config.noise is not None
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    noise = torch.tensor(drafter.config.noise.token_ids)[None]
    with torch.no_grad():
        expected = [noise_logits(adapted, TEXT[None, : n + 1], noise) for n in PLACES]
    found = our_logits(drafter, target)
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-3, rtol=1e-3)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """All that a command says, but for progress bars."""
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-mtp "), line
    assert not any("Error" in text or "Traceback" in text for text in before), before
    return line


class TestTarget:
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ({"num_hidden_layers": 3}, "layers.3.mlp.down_proj and 6 more: the target"),
            ({"num_hidden_layers": 5}, "and 6 more: target_modules names it, but it"),
            ({"intermediate_size": 64}, "has (inputs, outputs) (96, 64), the target's"),
            (
                {"num_key_value_heads": 4},
                "has (inputs, outputs) (64, 64), the target's",
            ),
        ],
    )
    def test_another_targets_adapter_is_refused(
        self,
        overrides: dict[str, int],
        expected: str,
        tiny_llama: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        save_adapter(tiny_llama, tmp_path / "adapter")
        other = make_tiny("llama", tmp_path / "other", **overrides)
        assert import_adapter(tmp_path / "adapter", other, tmp_path / "d") == 1
        assert expected in refusal(capsys)

    @pytest.mark.parametrize(
        ("family", "modules", "expected"),
        [
            ("phi3", ["qkv_proj"], "qkv_proj: LoRA of a drafter stands on q_proj, k_"),
            ("llama", ["q_proj", "lm_head"], "alone, got base_model.model.lm_head.bas"),
            ("gemma3_mm", ["q_proj"], "its pairs stand in several parts of a model: "),
        ],
    )
    def test_modules_that_no_drafter_changes_are_refused(
        self,
        family: str,
        modules: list[str],
        expected: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        target = make_tiny(family, tmp_path / "target")
        save_adapter(target, tmp_path / "adapter", target_modules=modules)
        assert import_adapter(tmp_path / "adapter", target, tmp_path / "d") == 1
        assert expected in refusal(capsys)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny_llama, folder, target_modules=["q_proj"])
    return folder


def test_pairs_outside_of_the_layers_are_refused(
    adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    odd = {name.replace("layers.3", "block"): t for name, t in tensors.items()}
    (tmp_path / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    save_file(odd, tmp_path / WEIGHTS_FILE)
    assert import_adapter(tmp_path, tiny_llama, tmp_path / "d") == 1
    expected = "model.block.self_attn.q_proj: a pair outside of the decoder layers"
    assert expected in refusal(capsys)


class TestNoise:
    def noise(self, folder: Path) -> Any:
        return read_config(folder).noise

    def test_tokens_follow_from_the_seed(
        self, adapter: Path, tiny_llama: Path, tmp_path: Path
    ) -> None:
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
            flags = ("--seed", seed, "--mask-token-id", "9")
            assert import_adapter(adapter, tiny_llama, tmp_path / name, *flags) == 0
        first, again, other = (self.noise(tmp_path / name) for name in "abc")
        assert first == again
        assert first.token_ids != other.token_ids
        assert (first.low, first.high) == (1, 9)

    def test_given_tokens_and_their_embeddings(
        self, adapter: Path, tiny_llama: Path, tmp_path: Path
    ) -> None:
        flags = ("--noise-ids", "0", "9", "9", "--noise-low", "0")
        assert import_adapter(adapter, tiny_llama, tmp_path / "d", *flags) == 0
        noise = self.noise(tmp_path / "d")
        assert (noise.low, noise.high) == (0, VOCAB_SIZE)
        assert noise.token_ids == (0, 9, 9)
        table = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
        placeholders = load_drafter(tmp_path / "d").placeholders
        assert placeholders is not None
        assert placeholders.equal(table[[0, 9, 9]])

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--noise-ids", "3"], "--noise-ids: got 1 ids, expected 3, one less than"),
            (["--noise-ids", "3", "0", "4"], "--noise-ids: got 0, expected 1 to 511"),
            (["--mask-token-id", "513"], "--mask-token-id: got 513, expected 1 to 512"),
            (["--mask-token-id", "1"], "--noise-low: got 1, expected 0 to 0"),
            (["--noise-low", "-1"], "--noise-low: got -1, expected 0 to 511"),
            (["--num-speculative-tokens", "1"], "--num-speculative-tokens: got 1, exp"),
            (
                ["--num-speculative-tokens", "65"],
                "--num-speculative-tokens: got 65, exp",
            ),
            (["--revision", "main"], "revision: got 'main', but"),
            (["--subfolder", "no"], "adapter_config.json: no such file"),
        ],
        ids=str,
    )
    def test_wrong_flags_are_one_line(
        self,
        flags: list[str],
        expected: str,
        adapter: Path,
        tiny_llama: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert import_adapter(adapter, tiny_llama, tmp_path / "d", *flags) == 1
        assert expected in refusal(capsys)
        assert not (tmp_path / "d").exists()


def test_an_imported_drafter_says_where_it_came_from(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tiny_llama, tmp_path / "hub" / "adapter")
    flags = ("--subfolder", "adapter", "--noise-ids", "3", "5", "7")
    assert import_adapter(tmp_path / "hub", tiny_llama, tmp_path / "d", *flags) == 0
    assert "embeddings of the tokens [3, 5, 7]" in capsys.readouterr().out
    provenance = read_provenance(tmp_path / "d")
    assert provenance is not None
    assert provenance.adapter is not None
    assert (provenance.adapter.name, provenance.adapter.base_model) == (
        "adapter",
        tiny_llama.name,
    )
    assert training_prompts(tmp_path / "d").held_out is None
    card = (tmp_path / "d" / "README.md").read_text()
    assert "imported from the PEFT adapter `adapter`" in card
    assert "drawn from 1 to 511" in card
    assert str(tmp_path) not in card
    assert main(["inspect", str(tmp_path / "d")]) == 0
    assert import_adapter(tmp_path / "hub", tiny_llama, tmp_path / "d", *flags) == 1


class TestHub:
    REVISION = "0123456789abcdef0123456789abcdef01234567"

    def test_of_a_repository_only_the_adapter_is_fetched(
        self,
        adapter: Path,
        tiny_llama: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Some hold a base model beside it."""
        root = tmp_path / "models--some--uno" / "snapshots" / self.REVISION
        shutil.copytree(adapter, root / "adapter")
        asked: dict[str, Any] = {}

        def fetch(name: str, **how: Any) -> str:
            asked.update(how, name=name)
            return str(root)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        flags = ("--subfolder", "adapter", "--revision", "main")
        out = tmp_path / "d"
        assert import_adapter(Path("some/uno"), tiny_llama, out, *flags) == 0
        assert (asked["name"], asked["revision"]) == ("some/uno", "main")
        names = [*(f"adapter/{n}" for n in (CONFIG_FILE, WEIGHTS_FILE, NOISE_FILE))]
        assert asked["allow_patterns"] == [*names, f"*/{CONFIG_FILE}"]
        provenance = read_provenance(out)
        assert provenance is not None
        assert provenance.adapter is not None
        found = provenance.adapter.name, provenance.adapter.revision
        assert found == ("some/uno", self.REVISION)

    def test_what_cannot_be_fetched_is_one_line(
        self,
        tiny_llama: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fetch(*_: Any, **__: Any) -> str:
            raise OSError("no network")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        assert import_adapter(Path("some/uno"), tiny_llama, tmp_path / "d") == 1
        assert "--adapter 'some/uno': no such folder here, and" in refusal(capsys)


class TestExport:
    OPTIONS = DrafterOptions(
        dtype="bfloat16",
        placeholder_kind="noise",
        mask_token_id=400,
        lora_rank=3,
        lora_alpha=1.5,
        lora_modules=["q_proj", "down_proj"],
    )

    def test_the_way_back_is_exact(
        self, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drafter = new_drafter(tiny_llama, "shared:all", K, self.OPTIONS)
        fill_weights(torch.nn.ModuleList(drafter.layers), 0.2)
        first = save_drafter(drafter, tmp_path / "first")
        assert export(first, tiny_llama, tmp_path / "adapter") == 0
        # K and the tokens stand beside the adapter.
        command = ["import", str(tmp_path / "adapter"), "--target", str(tiny_llama)]
        assert main([*command, "--out", str(tmp_path / "again")]) == 0
        # Neither way writes over what is there.
        for folder, again in (
            ("adapter", ["export", str(first), "--target", str(tiny_llama)]),
            ("again", command),
        ):
            assert main([*again, "--out", str(tmp_path / folder)]) == 1
            said = rf"--out .*{folder}: holds a \w+\.json already; name another"
            assert re.search(said, refusal(capsys))
        assert (tmp_path / "again" / "config.json").read_bytes() == (
            first / "config.json"
        ).read_bytes()
        ours, theirs = (
            load_file(f / "model.safetensors") for f in (first, tmp_path / "again")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert tensor.equal(theirs[name]), name

    @pytest.mark.parametrize(
        "family", ["llama", "qwen3_vl", pytest.param("gemma4", marks=pytest.mark.slow)]
    )
    def test_peft_loads_it(self, family: str, tmp_path: Path) -> None:
        """Also where layers differ in their modules, ranks and scales."""
        target = make_tiny(family, tmp_path / "target")
        options = DrafterOptions(placeholder_kind="noise", dtype="float32")
        config = new_drafter(target, "shared:all", K, options).config.model_dump()
        for index, layer in enumerate(config["layers"]):
            modules = ["q_proj", "up_proj"][:index]
            lora = {"rank": 2 + index, "alpha": 4.0, "modules": modules}
            layer["lora"] = lora if index else None
        drafter = Drafter(DrafterConfig.model_validate_json(json.dumps(config)))
        fill_weights(drafter, 0.2)
        save_drafter(drafter, tmp_path / "drafter")
        assert export(tmp_path / "drafter", target, tmp_path / "adapter") == 0
        model = load_frozen(target, "float32", "cpu")
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
        loaded = {
            name.replace(".default", ""): weight
            for name, weight in adapted.named_parameters()
            if "lora_" in name
        }
        written = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
        assert loaded.keys() == written.keys()
        assert all(loaded[name].equal(weight) for name, weight in written.items())
        scales = {
            module.scaling["default"]
            for module in adapted.modules()
            if isinstance(module, LoraLayer)
        }
        assert scales == {4.0 / rank for rank in (3, 4, 5)}
        command = ["import", str(tmp_path / "adapter"), "--target", str(target)]
        assert main([*command, "--out", str(tmp_path / "again")]) == 0
        assert loras(tmp_path / "again") == loras(tmp_path / "drafter")

    @pytest.mark.parametrize(
        ("layers", "options", "expected"),
        [
            ("own:all", {}, "layers [0, 1, 2, 3] are its own"),
            ("shared:0-2", {}, "it does not run every layer of the target"),
            ("shared:all", {"lora_rank": 0}, "it has no LoRA"),
            (
                "shared:all",
                {"placeholder_kind": "trained", "mask_token_id": None},
                "its placeholders are trained vectors",
            ),
            ("shared:all", {"markov_rank": 2}, "markov: it corrects logits"),
            ("shared:all", {"prefix_window": 64}, "prefix_window: it reads a part"),
            ("shared:all", {"draft_vocab_size": 2}, "draft_vocab_size: it drafts"),
            ("shared:all,mlp:1", {}, "layers [4] are its own"),
            (
                "shared:all",
                {"full_rank_modules": ["k_proj"]},
                "layers [0, 1, 2, 3]: full_rank: no change of low rank",
            ),
            (
                "shared:all",
                {"block_mask": "bidirectional"},
                "block_mask: its rows read rows behind them",
            ),
            ("shared:all", {"extra_rows": 2}, "extra_rows: it has trained rows"),
            ("shared:all", {"lm_head": "own"}, "lm_head: it has LM heads of its own"),
            (
                "shared:all",
                TRAINED | {"chain": True},
                "chain: its positions run one after the other; it has no placeholders",
            ),
            (
                "shared:all",
                TRAINED | {"input": "boundary"},
                "input: a hidden state enters it, and no tokens; it has no placehol",
            ),
        ],
    )
    def test_what_an_adapter_cannot_say_is_refused_by_name(
        self,
        layers: str,
        options: dict[str, Any],
        expected: str,
        tiny_llama: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        made = DrafterOptions(**vars(self.OPTIONS) | options)
        ids = (3, 5) if "draft_vocab_size" in options else None
        save_drafter(new_drafter(tiny_llama, layers, K, made, ids), tmp_path / "d")
        assert export(tmp_path / "d", tiny_llama, tmp_path / "adapter") == 1
        assert expected in refusal(capsys)
        assert not (tmp_path / "adapter").exists()

    def test_merged_modules_are_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = make_tiny("phi3", tmp_path / "target")
        save_drafter(new_drafter(target, "shared:all", K, self.OPTIONS), tmp_path / "d")
        assert export(tmp_path / "d", target, tmp_path / "adapter") == 1
        assert "'q_proj' is part of a merged module of this" in refusal(capsys)
