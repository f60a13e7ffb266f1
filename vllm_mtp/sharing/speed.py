# SPDX-License-Identifier: Apache-2.0
"""``speed.json``: what `vllm-mtp bench` measured of a drafter, for its card."""

from pathlib import Path

from pydantic import Field, ValidationError

from vllm_mtp.errors import DataError
from vllm_mtp.sharing.provenance import Record

SPEED_FILE = "speed.json"


class SpeedRow(Record):
    """The drafter under one load."""

    requests: int = Field(ge=1, description="At once.")
    ratio: float = Field(gt=0, description="Tokens/s over no speculation; median.")
    low: float = Field(gt=0, description="Lowest of the rounds.")
    high: float = Field(gt=0, description="Highest of the rounds.")
    acceptance_length: float = Field(ge=1, description="Bonus token included.")
    control: tuple[float, float] | None = Field(
        default=None,
        description="Lowest and highest ratio of a second server without speculation.",
    )


class StepRow(Record):
    """A decoding step with a draft over one without (`vllm-mtp bench --profile`)."""

    requests: int = Field(ge=1, description="At once.")
    tokens: int = Field(ge=1, description="Of a draft.")
    draft: float = Field(gt=0, description="The draft's time, under the profiler.")
    step: float = Field(gt=0, description="The whole step's time, without it.")


class SpeedRecord(Record):
    """What one benchmark measured, as a user would serve the drafter there."""

    device: str
    versions: str
    environment: str = Field(description="Variables that the servers were given.")
    dtype: str
    compiled: bool
    rounds: int = Field(ge=1)
    fresh_servers: bool = Field(default=False, description="In each round.")
    schedule: list[tuple[int, int, int]] = Field(
        default=[],
        description="vLLM's `num_speculative_tokens_per_batch_size`, as calibrated. "
        "Empty: the number of tokens was left to the method.",
    )
    rows: list[SpeedRow]
    steps: list[StepRow] = Field(default=[], description="Empty: not profiled.")

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def steps_text(speed: SpeedRecord) -> str:
    """What a draft was measured to take, in words; empty where it was not."""
    return "; ".join(
        f"{row.tokens} tokens, {row.requests} at once: the draft {row.draft:.2f}, the "
        f"whole step {row.step:.2f} of a step without"
        for row in speed.steps
    )


def read_speed(folder: Path | str) -> SpeedRecord | None:
    """Read a drafter's ``speed.json``.

    Returns:
        None where the folder has none.

    Raises:
        DataError: The file is something else.
    """
    path = Path(folder, SPEED_FILE)
    if not path.is_file():
        return None
    try:
        return SpeedRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(
            f"{path}: {where}: {problem['msg']}; run `vllm-mtp bench --into-card` "
            "again, or remove the file"
        ) from None
