# SPDX-License-Identifier: Apache-2.0
"""What vLLM's chat endpoint makes of a conversation, and what `generate` does."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig

from tests.data.conftest import ASSISTANT, BEGIN, END, USER
from vllm_mtp import engine
from vllm_mtp.data.odd_rows import OddRows
from vllm_mtp.data.prompts import Prompt
from vllm_mtp.data.render import Renderer
from vllm_mtp.errors import DataError, MTPError

pytest.importorskip("vllm")

QUESTION = [{"role": "user", "content": "Hello"}]


def test_the_template_of_transformers_is_applied(chat_target: Path) -> None:
    chat = engine.front_end(chat_target)
    turns = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert chat.render(turns) == f"{BEGIN}{USER}hi{END}{ASSISTANT}"
    # The turns are not changed, since they are rendered once more for a resumed run.
    assert turns[0]["content"] == [{"type": "text", "text": "hi"}]
    assert chat.vocab_size == 512
    assert chat.can_chat


TOOL = {
    "function": {"parameters": {"b": 1, "a": 2}, "name": "f"},
    "type": "function",
}


def test_tools_are_what_the_chat_endpoint_makes_of_them(
    chat_target: Path, tmp_path: Path
) -> None:
    """Checked, with the keys in its order, and null for what is left out."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    target = tmp_path / "tools"
    shutil.copytree(chat_target, target)
    template = "{{ tools | tojson }}{{ messages[-1].content }}"
    (target / "chat_template.jinja").write_text(template)
    chat = engine.front_end(target)
    request = ChatCompletionRequest(messages=QUESTION, tools=[TOOL])
    (served,) = [tool.model_dump() for tool in request.tools or ()]
    rendered = str(chat.render(QUESTION, [TOOL]))
    found = json.loads(rendered.removesuffix("Hello"))
    assert json.dumps(found) == json.dumps([served])
    assert list(found[0]) != list(TOOL)
    assert found[0]["function"]["description"] is None
    odd = OddRows()
    wrong: list[Any] = [{"type": "function"}, TOOL | {"type": "x"}, {"x": 1}, {}]
    prompts = [Prompt(tuple(QUESTION), "c", (tool,)) for tool in [*wrong, TOOL]]  # type: ignore[arg-type]
    assert len(list(Renderer(chat).render(prompts, odd))) == 1
    assert odd.counts == {"the target's chat template refuses it": len(wrong)}


def test_the_environment_stays_as_it_was(
    chat_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM preloads and counts for an engine; servers are started after this one."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("NUMEXPR_MAX_THREADS", raising=False)
    engine.vllm_version()  # imports it
    before = dict(os.environ)
    engine.front_end(chat_target)
    assert dict(os.environ) == before
    with pytest.raises(MTPError):
        engine.front_end(tmp_path)
    assert dict(os.environ) == before


@pytest.fixture
def mistral_target(tmp_path: Path) -> Path:
    """Config and tokenizer of a folder with Mistral's own files."""
    common = pytest.importorskip("mistral_common")
    source = Path(common.__file__).parent / "data" / "tekken_240911.json"
    tekken = json.loads(source.read_text("utf-8"))
    tekken["vocab"] = tekken["vocab"][:400]
    tekken["config"] |= {"num_vocab_tokens": 400, "default_vocab_size": 1400}
    folder = tmp_path / "mistral"
    MistralConfig(
        vocab_size=1400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        architectures=["MistralForCausalLM"],
    ).save_pretrained(folder)
    (folder / "tekken.json").write_text(json.dumps(tekken), "utf-8")
    return folder


def test_mistral_files_are_read_by_mistral_common(
    mistral_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By itself where the weights are in Mistral's files too, else if told."""
    told = engine.front_end(mistral_target, tokenizer_mode="mistral")
    whole = tmp_path / "whole"  # vLLM looks at a folder's files once
    shutil.copytree(mistral_target, whole)
    save_file({"a": torch.zeros(1)}, whole / "consolidated.safetensors")
    found = engine.front_end(whole)
    # <s> [INST] H e ll o [/INST]
    expected = [1, 3, 1072, 1299, 1108, 1111, 4]
    assert told.render(QUESTION) == found.render(QUESTION) == expected
    assert found.can_chat
    odd = OddRows()
    asked = Prompt(tuple(QUESTION), "c")  # type: ignore[arg-type]
    refused = Prompt(({"role": "judge", "content": "x"},), "c", where="line 7")
    renderer = Renderer(found)
    (rendered,) = renderer.render([refused, asked], odd)
    assert rendered == (asked, expected)
    assert renderer.decode(expected) == "<s>[INST]Hello[/INST]"
    assert "refuses it (first: line 7: " in odd.explained()[0]
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    hello = [1, 1072, 1299, 1108, 1111]
    assert engine.tokenizer_of(whole)("Hello").input_ids == hello
    asked_for = engine.tokenizer_of(mistral_target, "mistral")
    assert asked_for.IS_MISTRAL_TOKENIZER
    assert asked_for("Hello").input_ids == hello


def test_ids_of_calls_are_cut_as_mistral_asks(mistral_target: Path) -> None:
    chat = engine.front_end(mistral_target, tokenizer_mode="mistral")

    def turns(identifier: str) -> list[dict[str, Any]]:
        function = {"name": "f", "arguments": "{}"}
        call = {"id": identifier, "type": "function", "function": function}
        return [
            QUESTION[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "y", "tool_call_id": identifier},
        ]

    assert chat.render(turns("call_123456789")) == chat.render(turns("123456789"))


def test_without_a_template_the_mode_is_advised(
    chat_target: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(chat_target, base)
    (base / "chat_template.jinja").unlink()
    chat = engine.front_end(base)
    assert not chat.can_chat
    with pytest.raises(DataError, match=r"no chat template.*--tokenizer-mode mistral"):
        Renderer(chat)
    assert Renderer(chat, chat_template=False).token_ids_of("a")


def test_a_folder_without_a_tokenizer(tiny_llama: Path) -> None:
    for load in (engine.front_end, engine.tokenizer_of):
        with pytest.raises(MTPError, match="tokenizer cannot be loaded") as error:
            load(tiny_llama)
        assert "\n" not in str(error.value)
