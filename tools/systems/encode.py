# SPDX-License-Identifier: Apache-2.0
"""The target's states of all texts, once for every system.

A third to half of a training step is the target's own forward, and all systems read the
same texts: encoded before, it is no part of their budgets.
"""

from pathlib import Path

from rich.progress import track

from tools.systems.presets import presets
from vllm_mtp.cli.main import _load
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.training.run import TrainingRun
from vllm_mtp.training.states_folder import StatesFolder


def encode(target: str, data: str, states: Path) -> None:
    """Write the states that any system reads, where they are not there.

    Args:
        target: The target's folder.
        data: The folder of its answers.
        states: What ``--states-folder`` of a training names.
    """
    given = [f"--target={target}", f"--data={data}", f"--output_dir={states}"]
    settings = [
        _load("train", [str(preset.file), *given]) for preset in presets().values()
    ]
    common = settings[0]  # in the data and the types, all are alike
    run = TrainingRun(common, target_folder(target))
    cached: set[int] = set()
    streams: set[int] = set()
    for args in settings:
        trainer = run.trainer(run.new_drafter(args), args)
        cached.update(trainer.loss_module.cached_layers)
        streams.update(trainer.loss_module.streams)
    texts = trainer.train_dataset
    with common.autocast():  # as training asks for them: the folder's name tells types
        folder = StatesFolder(states, run.host)
        for number in track(range(len(texts)), "encoding texts"):  # type: ignore[arg-type]
            token_ids = texts[number]["input_ids"].to(common.device)  # type: ignore[index]
            folder.states(token_ids, cached, streams)
