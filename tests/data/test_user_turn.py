# SPDX-License-Identifier: Apache-2.0
"""What stands around a user's text, cut out of chat templates of several families."""

from typing import Any

import pytest

from tests.data.conftest import ASSISTANT, BEGIN, END, TEMPLATE, USER, make_tokenizer
from vllm_mtp.data.render import Renderer
from vllm_mtp.data.user_turn import UserTurn, user_turn
from vllm_mtp.errors import DataError

TURNS = "{% for turn in messages %}"
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}" + TURNS + "{{ '<|im_start|>' + turn.role + '\n' + turn.content + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "<bos>" + TURNS + "{{ '<|head|>' + turn.role + '<|tail|>\n\n' + "
    "turn.content | trim + '<|eot|>' }}{% endfor %}<|head|>assistant<|tail|>\n\n"
)
ALPACA = (
    TURNS + "{% if turn.role == 'user' %}### Instruction:\n{{ turn.content }}\n\n"
    "### Response:\n{% else %}{{ turn.content }}\n\n{% endif %}{% endfor %}"
)
ONE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    "[INST] {{ messages[0].content }} [/INST]"
)
WORDS = TURNS + "{{ turn.role }}\n{{ turn.content }}\n\n{% endfor %}assistant\n"


def cut(template: str) -> UserTurn:
    tokenizer = make_tokenizer()

    def render(turns: Any) -> str:
        return tokenizer.apply_chat_template(
            list(turns),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )  # type: ignore[return-value]

    return user_turn(render)


@pytest.mark.parametrize(
    ("template", "before", "markers"),
    [
        (TEMPLATE, BEGIN + USER, {BEGIN + USER, END + ASSISTANT, END + USER}),
        (
            CHATML,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
            {"<|im_start|>user", "<|im_end|>", "<|im_start|>assistant"},
        ),
        (
            HEADERS,
            "<bos><|head|>user<|tail|>\n\n",
            {
                "<bos><|head|>user<|tail|>",
                "<|eot|><|head|>assistant<|tail|>",
                "<|eot|><|head|>user<|tail|>",
            },
        ),
        (ALPACA, "### Instruction:\n", {"### Instruction:", "### Response:"}),
        (ONE_TURN, "[INST]", {"[INST]", "[/INST]"}),
        # "user" and "assistant" are words of prompts too.
        (WORDS, "user\n", set()),
    ],
)
def test_the_template_is_cut(template: str, before: str, markers: set[str]) -> None:
    assert cut(template) == UserTurn(before, frozenset(markers))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content }}<|end|>", "writes nothing before a user's text"),
        ("<|user|>{{ messages[0].content | length }}", "user's text 0 times"),
        ("<|user|>{{ messages[0].content * 2 }}", "user's text 2 times"),
        ("<|user|>{{ messages[0].content | upper }}", "user's text 0 times"),
        (
            (
                "{% if 'Qz' in messages[0].content %}<|a|>{% else %}<|b|>{% endif %}"
                "{{ messages[0].content }}"
            ),
            "different things around different texts",
        ),
        ("{{ raise_exception('system first') }}", r"refuses a plain .*system first"),
    ],
)
def test_what_cannot_be_cut_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        cut(template)
    assert str(error.value).startswith("--prompts self:N: the target's chat template")
    assert "\n" not in str(error.value)


def test_token_ids_cannot_be_cut() -> None:
    with pytest.raises(DataError, match="mistral-common.*--tokenizer-mode hf"):
        user_turn(lambda _: [1, 2, 3])


class _Chat:
    """No template is asked for, so this is not called."""

    tokenizer = None
    vocab_size = 9

    def render(self, *_: Any, **__: Any) -> str:
        raise AssertionError


def test_a_base_model_has_none() -> None:
    with pytest.raises(DataError, match="no-chat-template: with --prompts"):
        Renderer(_Chat(), chat_template=False).user_turn()
