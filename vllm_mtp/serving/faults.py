# SPDX-License-Identifier: Apache-2.0
"""A drafter that fails while it serves must not end the engine.

Drafts only make serving faster, so a step can always go on without them. What the
step then hands to vLLM differs from runner to runner and stands there.
"""

import contextlib
import logging

import torch
from prometheus_client import REGISTRY, Counter

logger = logging.getLogger("vllm.mtp_placeholder")

MAX_FAILURES = 3
"""Failures, in all, after which speculation stays off.

In all and not in a row: a failure is a fault in the code or in a file, and no state
that passes. A few are evidence enough, and so the log and the time lost stay small
also where only some batches fail.
"""

FILLER_TOKEN = 0
"""The draft where there is none but vLLM takes no fewer. Every vocabulary has it, and
vLLM's V1 runner takes it for the same purpose near the length limit."""

COUNTER_NAME = "vllm:mtp_placeholder_draft_failures"
# Registered with the first failure: vLLM drops all metrics of such a name from the
# registry when an engine starts.
_counter = Counter(
    COUNTER_NAME,
    "Steps in which the drafter failed and drafted nothing.",
    registry=None,
)

# A device that failed refuses all later work too, the target's included. Libraries
# report it as a plain RuntimeError with one of these in its text.
_DEVICE_FAULTS = ("CUDA error", "HIP error", "XPU error", "Triton Error", "NCCL error")


class DraftGuard:
    """Counts drafts that failed, and gives drafting up after `MAX_FAILURES`.

    Some errors go on and end the engine as vLLM ends it:

    - whatever is no ``Exception`` (``KeyboardInterrupt``, ``SystemExit``), which a
      runner does not catch;
    - errors of the device, out of memory included: vLLM sized the cache with the
      drafter running, so memory that is short now is short for the target as well;
    - every error where several processes share the target (tensor parallelism): one
      that drafted nothing would part from the others, which wait for it in a
      collective.

    Errors that a device reports late surface elsewhere and are never seen here.

    Args:
        alone: Whether one process holds the whole target.

    Attributes:
        failures: Drafts that failed in this process.
        is_off: Whether drafting was given up.
    """

    def __init__(self, alone: bool) -> None:
        self._alone = alone
        self.start_over()

    def start_over(self) -> None:
        """Forget the failures of a drafter that another one has replaced."""
        self.failures = 0
        self.is_off = False

    def survive(self, error: Exception) -> None:
        """Note an error in a draft, after which the step goes on without drafts.

        Raises:
            Exception: ``error``, of the kinds named above.
        """
        if not self._alone or _is_device_fault(error):
            raise error
        self._count(error)

    def _count(self, error: Exception) -> None:
        self.failures += 1
        self.is_off = self.failures >= MAX_FAILURES
        _counter.inc()
        with contextlib.suppress(ValueError):  # it is there already
            REGISTRY.register(_counter)
        reason = f"{type(error).__name__}: {error}"
        if self.failures == 1:
            logger.error(
                "mtp_placeholder: the drafter failed (%s). The step goes on without "
                "drafts; outputs are not affected. After %d such failures speculation "
                "stays off until the engine is started again.",
                reason,
                MAX_FAILURES,
                exc_info=error,
            )
        if self.is_off:
            logger.warning(
                "mtp_placeholder: speculation stays off after %d failures of the "
                "drafter, the last one %s. Outputs are not affected. Start the engine "
                "again to draft again.",
                self.failures,
                reason,
            )


def _is_device_fault(error: Exception) -> bool:
    if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(f in text for f in _DEVICE_FAULTS)
