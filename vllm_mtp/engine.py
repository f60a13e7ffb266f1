# SPDX-License-Identifier: Apache-2.0
"""vLLM as a tool: the one place outside `serving` that uses it.

`serving` is what vLLM loads; this module is the other way round. It starts engines in
this process and looks into them. vLLM is imported when a function here is called.
"""

import asyncio
import contextlib
import copy
import gc
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_mtp.errors import MTPError, in_one_line

if TYPE_CHECKING:
    from vllm import LLM as LLM
    from vllm import SamplingParams

_MISTRAL_FILES = ("tekken.json", "tokenizer.model.v*")
_HF_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


@contextlib.contextmanager
def start(
    target: str | os.PathLike[str],
    *,
    cache_gib: int = 1,
    in_process: bool = True,
    enforce_eager: bool | None = None,
    **settings: Any,
) -> "Iterator[LLM]":
    """One vLLM engine for text, gone when the ``with`` block ends.

    Args:
        target: The target's folder.
        cache_gib: Of the KV cache on a CPU, unless the user's environment says.
        in_process: Without a second process no core is spent on waiting, and the
            runner can be reached; unless the user's environment says.
        enforce_eager: None for only on a CPU, where compiling takes longer than it
            wins; GPUs have CUDA graphs.
        settings: Everything else that ``vllm.LLM`` takes.
    """
    # Before vLLM is imported, which reads some of it then.
    _quietly()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    if in_process:
        os.environ.setdefault(_IN_PROCESS, "0")
    from vllm import LLM

    llm = LLM(
        str(target),
        enforce_eager=is_cpu() if enforce_eager is None else enforce_eager,
        **{"use_tqdm_on_load": False} | _text_only(target) | settings,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def front_end(
    target: str | os.PathLike[str],
    *,
    generation_config: str = "auto",
    tokenizer_mode: str = "auto",
    **settings: Any,
) -> "FrontEnd":
    """What ``vllm serve`` does with a target's requests.

    Args:
        target: The target's folder.
        generation_config: Where sampling defaults come from, as vLLM's flag: ``auto``
            (the target's folder), ``vllm`` (none), or a folder.
        tokenizer_mode: As vLLM's flag; ``auto`` takes mistral-common only where the
            weights are in Mistral's own files too.
        settings: More of the engine that will answer, to be checked now: what
            ``vllm.EngineArgs`` takes.

    Raises:
        MTPError: vLLM does not take the target, or its tokenizer cannot be loaded.
    """
    _quietly()
    # What the import sets stays: it happens once.
    from vllm.engine.arg_utils import EngineArgs

    flags = "".join(
        f" --{name.replace('_', '-')} {value}"
        for name, value in settings.items()
        if value is not None
    )
    what = "vLLM does not take it" + (flags and f" with{flags}")
    try:
        with _same_environment():
            arguments = EngineArgs(
                str(target),
                generation_config=generation_config,
                tokenizer_mode=tokenizer_mode,
                **_text_only(target) | settings,
            )
            config = arguments.create_engine_config()
            what = "its tokenizer cannot be loaded by vLLM"
            return FrontEnd(config)
    except Exception as error:  # of configs, pydantic, tokenizers, the hub ...
        raise MTPError(
            f"--target {target}: {what} ({in_one_line(error, 300)})"
        ) from None


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Take back what vLLM sets for an engine, such as LD_PRELOAD on a CPU: there is
    none, and servers that are started later would get it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


class FrontEnd:
    """What vLLM's chat endpoint does with a request before the engine gets it.

    Args:
        config: A ``VllmConfig``.
    """

    def __init__(self, config: Any) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import (
            ChatCompletionToolsParam,
        )
        from vllm.renderers.params import ChatParams
        from vllm.renderers.registry import renderer_from_config
        from vllm.tokenizers.registry import tokenizer_args_from_config

        # A conversation that is refused is told by an exception, without a traceback.
        logging.getLogger("vllm.renderers").setLevel(logging.CRITICAL)
        self._params = ChatParams
        self._tool = ChatCompletionToolsParam
        self._model = config.model_config
        self._renderer = renderer_from_config(config)
        self.tokenizer: Any = self._renderer.get_tokenizer()
        mode, *_ = tokenizer_args_from_config(self._model)
        # As the chat endpoint: mistral-common has no text in between.
        self._tokenize = mode == "mistral"

    @property
    def vocab_size(self) -> int:
        """Rows of the target's embedding."""
        return self._model.get_vocab_size()

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        named = self._model.try_get_generation_config().get("eos_token_id")
        ids = [named] if isinstance(named, int) else list(named or ())
        own = self.tokenizer.eos_token_id
        return frozenset(ids if own is None else [*ids, own])

    @property
    def is_harmony(self) -> bool:
        """Whether the chat endpoint writes OpenAI's harmony format, as for gpt-oss, and
        leaves the chat template aside; `render` does not."""
        return self._model.hf_config.model_type == "gpt_oss"

    @property
    def can_chat(self) -> bool:
        """Whether it takes a plain question; base models have no chat template."""
        try:
            self.render([{"role": "user", "content": "a"}])
        except Exception:  # as `render` says
            return False
        return True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
        *,
        answered: bool = False,
    ) -> str | list[int]:
        """A conversation as the chat endpoint renders it.

        Args:
            messages: In OpenAI's form.
            tools: Likewise.
            arguments: Of the chat template.
            answered: The last turn is the answer, so nothing shall follow it.

        Returns:
            A text, to be tokenized without special tokens, or token ids.

        Raises:
            Exception: Of any kind, where the template refuses the conversation.
        """
        settings = dict(arguments or {}) | {
            "add_generation_prompt": not answered,
            "continue_final_message": False,
            # Checked, with keys in order and every default, as the endpoint has them.
            "tools": [self._tool(**tool).model_dump() for tool in tools] or None,
            "tokenize": self._tokenize,
        }
        # The renderer changes the turns that it is given.
        turns: Any = copy.deepcopy(list(messages))
        if self._tokenize:
            self._as_mistral_asks(turns)
        _, prompt = self._renderer.render_messages(
            turns, self._params(chat_template_kwargs=settings)
        )
        found = prompt.get("prompt_token_ids")
        return prompt["prompt"] if found is None else list(found)

    @staticmethod
    def _as_mistral_asks(turns: list[Any]) -> None:
        from vllm.tokenizers import mistral

        request: Any = SimpleNamespace(messages=turns)
        mistral.maybe_serialize_tool_calls(request)
        mistral.truncate_tool_call_ids(request)

    def sampling_defaults(self) -> dict[str, Any]:
        """What the chat endpoint samples with where a request does not say.

        Raises:
            MTPError: The ``generation_config.json`` holds something else.
        """
        try:
            return dict(self._model.get_diff_sampling_param())
        except Exception as error:  # of any kind: transformers does not check
            source = self._model.generation_config
            folder = self._model.model if source in ("auto", "vllm") else source
            raise MTPError(
                f"{folder}/generation_config.json: cannot be used ({error}); expected "
                "a JSON object of transformers' generation settings, or no such file"
            ) from None


def tokenizer_of(target: str | os.PathLike[str], mode: str = "auto") -> Any:
    """A target's tokenizer, as vLLM takes it.

    Only for Mistral's own files, or where another one was asked for, is it another one
    than transformers', and vLLM is imported, where it is installed.

    Args:
        target: The target's folder.
        mode: As vLLM's ``--tokenizer-mode``, such as answers were made with.

    Raises:
        MTPError: It cannot be loaded.
    """
    by_vllm = mode != "auto" or _has_any(target, _MISTRAL_FILES)
    try:
        if by_vllm and find_spec("vllm") is not None:
            _quietly()
            from vllm.tokenizers import get_tokenizer

            return get_tokenizer(str(target), tokenizer_mode=mode)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(target)
    except Exception as error:  # of tokenizers, sentencepiece, the hub ...
        raise MTPError(
            f"--target {target}: its tokenizer cannot be loaded "
            f"({in_one_line(error, 300)})"
        ) from None


def has_tokenizer(target: str | os.PathLike[str]) -> bool:
    """Whether a folder has a tokenizer's files; targets made in code have none."""
    return _has_any(target, (*_HF_FILES, *_MISTRAL_FILES))


def _has_any(folder: str | os.PathLike[str], patterns: Sequence[str]) -> bool:
    return any(file for name in patterns for file in Path(folder).glob(name))


def _text_only(target: str | os.PathLike[str]) -> dict[str, Any]:
    """Without encoders and processors of images, where the target has any."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target)
    except (OSError, ValueError):  # vLLM says better what is wrong
        return {}
    sees = config.get_text_config() is not config
    return {"language_model_only": True} if sees else {}


def sampling(*, final_only: bool = False, **settings: Any) -> "SamplingParams":
    """vLLM's sampling settings; greedy unless told otherwise.

    Args:
        final_only: The engine's steps give a request's output once, when it has ended.
        settings: As ``vllm.SamplingParams`` takes them.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if final_only:
        settings["output_kind"] = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**{"temperature": 0.0} | settings)


def core_of(llm: "LLM") -> Any:
    """The engine core inside an engine of this process.

    Raises:
        MTPError: It runs in another process.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise MTPError(
            f"{_IN_PROCESS} is {os.environ.get(_IN_PROCESS)!r}, so vLLM's runner is in "
            "another process, out of reach; expected 0. Unset it"
        )
    return core


def runner_of(llm: "LLM") -> Any:
    """The model runner inside an engine of this process; raises as `core_of`."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner


def drafter_of(llm: "LLM") -> Any:
    """What drafts inside an engine of this process, on either runner; raises as
    `core_of`."""
    runner = runner_of(llm)
    return runner.speculator if hasattr(runner, "speculator") else runner.drafter


def bound_drafter_of(llm: "LLM") -> Any:
    """Our `BoundDrafter` inside an engine of this process; raises as `core_of`."""
    return drafter_of(llm)._bound


def is_cpu() -> bool:
    """Whether vLLM runs on a CPU here."""
    _quietly()
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def platform_name() -> str:
    """The device that vLLM found."""
    from vllm.platforms import current_platform

    return current_platform.device_name or current_platform.device_type


def has_triton() -> bool:
    """Whether vLLM can use Triton here."""
    from vllm.triton_utils import HAS_TRITON

    return HAS_TRITON


def vllm_version() -> str:
    """Of the vLLM that is imported."""
    _quietly()
    import vllm

    return vllm.__version__


def bench_serve(*arguments: str) -> dict[str, Any]:
    """Run ``vllm bench serve`` in this process, without its tables.

    A command of its own would import vLLM again each time, which takes longer than
    most measurements.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = parser.parse_args(list(arguments))
    with contextlib.redirect_stdout(io.StringIO()):
        return asyncio.run(main_async(options))


def _quietly() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
