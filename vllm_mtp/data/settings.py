# SPDX-License-Identifier: Apache-2.0
"""What a run of ``vllm-mtp generate`` was asked for, and what it gave, as JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from vllm_mtp.data.shard import Shard
from vllm_mtp.drafter.target_facts import TargetFacts

OFF_POLICY = (
    "the target did not write these answers (off-policy), and what it says when it is "
    "served is other text"
)
# A copy of the target in another folder is the same target, and the size of parts is
# no flag: a folder keeps its own.
_NOT_COMPARED = ("target.name", "part_prompts")
# Compared only where both are known; the first folders have none.
_SAMPLE = "weights_sample_sha256"
_ARGUMENTS = "chat_template_kwargs"


class _Model(BaseModel):
    # allow_inf_nan: JSON has neither, so such a file could not be read again.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class WritingSettings(_Model):
    """How the target writes prompts itself (`data.written`)."""

    # 0 would write the same prompt N times.
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, ge=1, description="Longest prompt, in tokens.")
    seed: int = Field(default=0, description="With each prompt's number: its own seed.")


class SourceSettings(_Model):
    """Where the prompts come from."""

    prompts: str = Field(
        description="`sharegpt`, `sharegpt:later`, `sharegpt:tasks`, `self:N`, a JSONL "
        "file or `hf:NAME_OR_PATH`."
    )
    writing: WritingSettings | None = Field(
        default=None, description="Of `self:N`; null: the prompts were there."
    )
    split: str = Field(default="train", description="Split of a dataset.")
    column: str = Field(default="prompt", description="Column of a dataset.")
    category_column: str | None = Field(default=None, description="Likewise.")
    skip: int = Field(default=0, ge=0, description="Rows to pass over first.")
    limit: int | None = Field(default=None, ge=0, description="Most rows to read.")
    shard: str | None = Field(
        default=None, description="Such as 3/8: the third of eight parts; null: all."
    )

    @field_validator("shard")
    @classmethod
    def _is_a_shard(cls, value: str | None) -> str | None:
        Shard.parse(value)
        return value


class SamplingSettings(_Model):
    """How the target answers."""

    max_tokens: int = Field(default=512, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0 is all tokens.")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, description="1 is none.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int = Field(default=0, description="With each prompt's hash: its own seed.")


class EngineSettings(_Model):
    """The engine, so far as it can change an answer."""

    dtype: str = "auto"
    tokenizer_mode: str = Field(default="auto", description="As vLLM's flag.")
    generation_config: str = Field(
        default="auto",
        description="Folder whose `generation_config.json` says which tokens end an "
        "answer; auto: the target's.",
    )
    max_model_len: int = Field(ge=2, description="Prompt and answer, in tokens.")
    max_num_seqs: int = Field(default=256, ge=1, description="Decoded at once.")
    quantization: str | None = Field(
        default=None, description="As vLLM's flag; null: as the weights are."
    )


class MachineSettings(_Model):
    """What one machine gives an engine. A stopped run may go on with another's: this
    rounds as another device does, and is no other target."""

    tensor_parallel_size: int = Field(default=1, ge=1, description="As vLLM's flag.")
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="As vLLM's flag; null: vLLM's default."
    )


class RunSettings(_Model):
    """Everything that decides which rows a run gives; a resumed run has the same."""

    target: TargetFacts
    source: SourceSettings
    sampling: SamplingSettings
    engine: EngineSettings
    chat_template: bool = Field(description="False: prompts as raw text.")
    chat_template_sha256: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default={}, description="Arguments of the chat template."
    )
    max_prompt_tokens: int = Field(ge=1, description="Longer prompts are dropped.")
    held_out: float = Field(ge=0, lt=1, description="Part of prompts in `held_out`.")
    vllm: str = Field(description="Version of vLLM.")
    policy: Literal["on-policy", "off-policy"] = Field(
        default="on-policy",
        description="Whether the target wrote the answers; off-policy: they were in "
        "the source, and `sampling` has only a limit for them.",
    )
    part_prompts: int | None = Field(
        default=None,
        ge=1,
        description="Answers written as one part; null in folders of the first "
        "version: four times `max_num_seqs`.",
    )
    weights_sample_sha256: str | None = Field(
        default=None, description="See `target.weights_sample_sha256`; null: unknown."
    )

    @property
    def part_rows(self) -> int:
        """Answers written as one part."""
        return self.part_prompts or 4 * self.engine.max_num_seqs

    @property
    def is_off_policy(self) -> bool:
        """Whether somebody else than the target wrote the answers."""
        return self.policy == "off-policy"

    def differences(self, other: "RunSettings") -> list[str]:
        """Name the keys in which ``other`` is not the same, with both values."""
        here, there = _flat(self.model_dump()), _flat(other.model_dump())
        for flat in (here, there):
            for key in _NOT_COMPARED:
                del flat[key]
        if None in (here[_SAMPLE], there[_SAMPLE]):
            del here[_SAMPLE], there[_SAMPLE]
        return [
            f"{key}: the folder has {here.get(key)!r}, this run has {there.get(key)!r}"
            for key in here | there
            if here.get(key) != there.get(key)
        ]

    def sampling_flags(self, other: "RunSettings") -> str:
        """The flags of ``generate`` that make ``other``'s sampling this one's."""
        theirs = other.sampling.model_dump()
        return " ".join(
            f"--{name.replace('_', '-')} {value}"
            for name, value in self.sampling
            if value != theirs[name]
        )


class RunFile(_Model):
    """``run.json``, written when a run starts."""

    format: int = 1
    settings: RunSettings
    prompts_sha256: str = Field(
        description="Of the list of prompts, in order; empty where nothing is "
        "answered, or the target has still to write them."
    )


class PromptCounts(_Model):
    """What became of the prompts before the target saw them."""

    read: int
    duplicates_dropped: int
    too_long_dropped: int
    odd_skipped: dict[str, int] = Field(
        default={}, description="Rows that could not be used, by reason."
    )
    in_other_shards: int = Field(default=0, description="Left to them.")

    @property
    def kept(self) -> int:
        dropped = self.duplicates_dropped + self.too_long_dropped
        dropped += self.in_other_shards
        return self.read - dropped - sum(self.odd_skipped.values())


class SplitCounts(_Model):
    """Size of one split."""

    rows: int
    tokens: int = Field(description="Of prompts and answers.")
    answer_tokens: int = Field(description="Inside the loss spans.")


class Provenance(_Model):
    """``generation.json``, written last: a folder with it is finished."""

    format: int = 1
    settings: RunSettings
    prompts_sha256: str
    versions: dict[str, str] = Field(description="vllm, transformers, vllm_mtp.")
    prompts: PromptCounts
    empty_answers_dropped: int
    splits: dict[str, SplitCounts]


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("rope_parameters", _ARGUMENTS):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
