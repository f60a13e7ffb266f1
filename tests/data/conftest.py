# SPDX-License-Identifier: Apache-2.0
"""A tiny target that can chat, and prompts for it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny_targets import make_tiny_llama
from vllm_mtp.data import sharegpt

BEGIN, END = "<|begin|>", "<|end|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
TEMPLATE = (
    BEGIN + "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<|{{ turn.role }}|>{{ turn.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

# As Qwen3's: a turn that is not the last one is without its thinking, and a prompt ends
# in an empty thinking where none is wanted.
THINKING_TEMPLATE = (
    BEGIN + "{% for turn in messages %}<|{{ turn.role }}|>"
    "{% if turn.role == 'assistant' and loop.last %}"
    "<think>{{ turn.reasoning or '' }}</think>{% endif %}"
    "{{ turn.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% if enable_thinking is defined "
    "and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)

WriteShareGPT = Callable[[Sequence[Sequence[tuple[str, str]]]], Path]
WriteJsonl = Callable[[Sequence[dict[str, Any]]], Path]


def generate_command(*switches: str, **flags: object) -> list[str]:
    """``generate``, its flags with their values, and switches; None: left out."""
    values = [
        [f"--{name.replace('_', '-')}", str(value)]
        for name, value in flags.items()
        if value is not None
    ]
    return ["generate", *sum(values, []), *switches]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; in front of raw texts, as Llama's has it, a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in (BEGIN, END, USER, ASSISTANT)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template."""
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def chat_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("targets") / "chat"
    # Many, so that sampled answers end at all lengths.
    ends = [made.eos_token_id, *range(400, 430)]
    make_tiny_llama(folder, eos_token_id=ends)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def thinking_target(
    chat_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with a template that has an argument `enable_thinking`."""
    folder = tmp_path_factory.mktemp("targets") / "thinking"
    shutil.copytree(chat_target, folder)
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    return folder


@pytest.fixture
def write_sharegpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteShareGPT:
    """Write conversations to a file that is read in place of the package's."""
    path = tmp_path / "sharegpt.json"
    monkeypatch.setattr(sharegpt, "demo_package_file", lambda *_: ("0", path))

    def write(conversations: Sequence[Sequence[tuple[str, str]]]) -> Path:
        items = [
            {
                "id": "x",
                "conversations": [{"from": who, "value": v} for who, v in turns],
            }
            for turns in conversations
        ]
        path.write_text(json.dumps(items))
        return path

    return write


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """Write rows to a file of prompts."""

    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write
