# SPDX-License-Identifier: Apache-2.0
"""vLLM as a tool: the one place outside `serving` that uses it.

`serving` is what vLLM loads; this module is the other way round. It starts engines in
this process and looks into them. vLLM is imported when a function here is called.
"""

import asyncio
import contextlib
import gc
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_mtp.errors import MTPError

if TYPE_CHECKING:
    from vllm import LLM as LLM
    from vllm import SamplingParams

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
