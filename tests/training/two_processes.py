# SPDX-License-Identifier: Apache-2.0
"""Several runs of `vllm-mtp train` in one launch: most of a launch is imports.

    torchrun --nproc_per_node 2 -m tests.training.two_processes A.yaml B.yaml

A file's name may say what happens to the second process: in `killed.yaml` it is killed
in step 25, in `broken.yaml` its loss is not finite.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_mtp.cli.main import main
from vllm_mtp.training.loss_module import LossModule

whole = LossModule.forward


def killed(
    self: LossModule, texts: Any, step: int, *args: Any, **kwargs: Any
) -> dict[str, torch.Tensor]:
    if step == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, texts, step, *args, **kwargs)


def broken(self: LossModule, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    outputs = whole(self, *args, **kwargs)
    return outputs | {"loss": outputs["loss"] * float("nan")}


if __name__ == "__main__":
    for settings in sys.argv[1:]:
        if os.environ["RANK"] == "1":
            forward = {"killed": killed, "broken": broken}
            LossModule.forward = forward.get(Path(settings).stem, whole)  # type: ignore[assignment]
        if code := main(["train", settings]):
            sys.exit(code)
