# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found, in a drafter's folder and on its card."""

import json
from pathlib import Path

import pytest

from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import DataError
from vllm_mtp.sharing.folder import write_folder, write_speed
from vllm_mtp.sharing.speed import (
    SPEED_FILE,
    SpeedRecord,
    SpeedRow,
    StepRow,
    read_speed,
)

SPEED = SpeedRecord(
    device="CPU, 2 cores",
    versions="vllm 0.32.0",
    environment="A=1",
    dtype="float32",
    compiled=True,
    rounds=3,
    schedule=[(1, 4, 2), (5, 8, 0)],
    rows=[SpeedRow(requests=1, ratio=1.25, low=1.2, high=1.3, acceptance_length=1.9)],
    steps=[StepRow(requests=1, tokens=2, draft=0.4, step=1.6)],
)


def test_the_card_tells_it_and_new_weights_forget_it(
    drafter: Drafter, tmp_path: Path
) -> None:
    folder = write_folder(drafter, tmp_path / "d")
    assert read_speed(folder) is None
    assert "## Speed" not in (folder / "README.md").read_text()
    write_speed(folder, SPEED)
    assert read_speed(folder) == SPEED
    card = (folder / "README.md").read_text()
    assert "| 1 | 1.25 (1.20 to 1.30) | 1.90 |" in card
    assert "`[[1, 4, 2], [5, 8, 0]]`" in card
    assert "| Type | float32, compiled |" in card
    measured = "2 tokens, 1 at once: the draft 0.40, the whole step 1.60"
    assert f"| Time of a draft, measured | {measured} of a step without |" in card
    write_folder(drafter, folder)
    assert not (folder / SPEED_FILE).exists()
    assert "## Speed" not in (folder / "README.md").read_text()


def test_the_card_of_a_length_left_to_the_method(
    drafter: Drafter, tmp_path: Path
) -> None:
    folder = write_folder(drafter, tmp_path / "d")
    row = SPEED.rows[0].model_copy(update={"control": (0.98, 1.02)})
    update = {"schedule": [], "rows": [row], "fresh_servers": True, "steps": []}
    speed = SPEED.model_copy(update=update)
    write_speed(folder, speed)
    assert read_speed(folder) == speed
    card = (folder / "README.md").read_text()
    assert "| Acceptance length | Control |" in card
    assert "| 1 | 1.25 (1.20 to 1.30) | 1.90 | 0.98 to 1.02 |" in card
    assert "Control: the ratio of a second server without speculation" in card
    assert "| Rounds | 3, the sides in turns, new servers in each |" in card
    assert "`num_speculative_tokens` was left out there" in card
    assert "num_speculative_tokens_per_batch_size" not in card


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    record = json.loads(SPEED.to_json())
    for name in ("steps", "fresh_servers"):
        del record[name]
    del record["rows"][0]["control"]
    (tmp_path / SPEED_FILE).write_text(json.dumps(record))
    found = read_speed(tmp_path)
    assert found is not None
    assert found.steps == []
    assert not found.fresh_servers
    assert found.rows[0].control is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "the file: Invalid JSON"),
        (
            SPEED.to_json().replace("1.25", "-1"),
            "rows.0.ratio: Input should be greater",
        ),
        (SPEED.to_json().replace('"rounds"', '"laps"'), "rounds: Field required"),
    ],
)
def test_another_file_is_refused_by_name(
    text: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / SPEED_FILE).write_text(text)
    with pytest.raises(DataError) as caught:
        read_speed(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / SPEED_FILE}: {expected}")
    assert "--into-card" in str(caught.value)
