# SPDX-License-Identifier: Apache-2.0
"""The drafter's layers as one compiled function, where vLLM compiles the target.

Run one by one, the small operations of a layer (norms, RoPE, activations) and Python
between them take as long as its products (docs/benchmark.md).
"""

import logging
from collections.abc import Callable

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental import _config as symbols
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from vllm_mtp.drafter.bound import BoundDrafter, RunLayers
from vllm_mtp.drafter.config import needs_blocks
from vllm_mtp.drafter.layers import BlockRows

logger = logging.getLogger("vllm.mtp_placeholder")

# Numbers that a core goes through in less time than it takes to wake the others.
_ONE_THREAD = 1 << 20


def compile_layers(bound: BoundDrafter, vllm_config: VllmConfig) -> None:
    """Compile the layers if the target is compiled as well, on a CPU.

    On GPUs the V2 runner's graphs take Python out of a draft, and nothing of this was
    run on one. ``enforce_eager`` of the engine or of the drafter turns it off.
    """
    spec_config = vllm_config.speculative_config
    eager = spec_config is not None and spec_config.enforce_eager
    target_is_eager = vllm_config.compilation_config.mode == CompilationMode.NONE
    if eager or target_is_eager or not current_platform.is_cpu():
        return
    if any(needs_blocks(layer) for layer in bound.drafter.config.layers):
        return  # numbers of blocks and positions change from draft to draft
    most_rows = (
        vllm_config.scheduler_config.max_num_seqs
        * bound.drafter.config.num_speculative_tokens
    )
    widest = most_rows * bound.drafter.config.target.hidden_size
    bound.layers_runner = _Compiled(bound.layers_runner, widest <= _ONE_THREAD)


class _Compiled:
    """A `RunLayers` that is compiled once for all numbers of rows but one.

    A single row would be compiled anew, as dynamo takes a size of 1 for a constant. It
    occurs where one request drafts one token, or row by row in a chain, which is not
    faster then.

    Args:
        run: What to compile.
        one_thread: Whether one thread does what lies between the products.
    """

    def __init__(self, run: RunLayers, one_thread: bool) -> None:
        self._run = run
        self._has_run = False

        def run_rows(
            embedded: torch.Tensor,
            positions: torch.Tensor,
            boundary: torch.Tensor | None,
            gate: torch.Tensor,
        ) -> torch.Tensor:
            # No layer asks how rows belong to blocks.
            return run(embedded, positions, boundary, gate, BlockRows(1))

        # Dynamo keeps what it has compiled by code object, and without guards it would
        # run another drafter's.
        run_rows.__code__ = run_rows.__code__.replace()
        # Weights, layers and types are the same in every call, so nothing needs to be
        # looked at again before it (which takes milliseconds).
        self._compiled: Callable[..., torch.Tensor] | None = torch.compile(
            run_rows,
            fullgraph=True,
            dynamic=True,
            options={
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
                **({"cpp.threads": 1} if one_thread else {}),
            },
        )

    def __call__(
        self,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
        gate: torch.Tensor,
        blocks: BlockRows,
    ) -> torch.Tensor:
        # Without guards, strides must be those of the first call.
        boundary = None if boundary is None else boundary.contiguous()
        rows = embedded.contiguous(), positions.contiguous(), boundary, gate
        if self._compiled is None or len(positions) == 1:
            return self._run(*rows, blocks)
        try:
            if self._has_run:
                return self._compiled(*rows)
            # Sizes that are equal by chance, as the first number of rows and a width,
            # are else taken for the same one in all calls.
            with symbols.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                out = self._compiled(*rows)
            self._has_run = True
            return out
        except TorchDynamoException as error:  # in the first call, while vLLM starts
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the drafter's layers are not compiled: %s", reason)
            self._compiled = None
            return self._run(*rows, blocks)
