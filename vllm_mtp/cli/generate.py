# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate``."""

import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_mtp.cli.generating import (
    answer_prompts,
    finish,
    first_prompt,
    goes_on,
    one_engine,
    prepare_written,
    report,
    take_answers,
)
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.errors import DataError
from vllm_mtp.flags import flag
from vllm_mtp.interrupts import advise

if TYPE_CHECKING:
    from vllm_mtp.cli.generating import StartEngine
    from vllm_mtp.data.odd_rows import OddRows
    from vllm_mtp.data.render import Renderer, Request
    from vllm_mtp.data.settings import (
        MachineSettings,
        PromptCounts,
        RunSettings,
    )
    from vllm_mtp.data.store import Store

_MAX_TOKENS = 512  # the longest answer, unless the user or the target says
_OF_WRITING = ("prompts_temperature", "prompts_top_p", "prompts_max_tokens")
_OF_HF = ("prompts_split", "prompts_column", "prompts_category_column")
# Flags that say how an engine answers.
_OF_ENGINE = (
    "temperature", "top_p", "top_k", "min_p", "seed",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
    "dtype", "quantization", "tensor_parallel_size", "gpu_memory_utilization",
)  # fmt: skip


@dataclass
class Generate:
    """Let a target answer prompts with vLLM's offline engine, without a drafter, and
    write prompts and answers as a `datasets` dataset of token ids, to train drafters
    on. A run that was stopped goes on with the same command. `--answers given` takes
    answers that are there already."""

    target: str = flag("the target's Hugging Face folder or hub name")
    prompts: str = flag(
        "sharegpt (first turns), sharegpt:later (later turns, with those before) or "
        "sharegpt:tasks (code, maths, translation and more, of its text); self:N, N "
        "prompts that the target writes itself; a JSONL file with `prompt` (text) or "
        "`messages` (turns, the last one the user's or a tool's), and, if wanted, "
        "`category` and `tools` per line; or hf:NAME_OR_PATH, a Hugging Face dataset"
    )
    out: str = flag("folder to write; one that holds a stopped run is continued")
    answers: Literal["target", "given"] = flag(
        "given: take the answers that the prompts' conversations end with; no engine "
        "is started, and the target did not write them (off-policy)",
        "target",
    )
    prompts_split: str = flag("hf: only; the dataset's split", "train")
    prompts_column: str = flag(
        "hf: only; the column with texts or lists of turns", "prompt"
    )
    prompts_category_column: str | None = flag(
        "hf: only; the column with categories; left out, the dataset's name is the "
        "category",
        None,
    )
    prompts_temperature: float = flag(
        "self:N only; the temperature at which the target writes prompts", 1.0
    )
    prompts_top_p: float = flag("self:N only; the top_p likewise", 1.0)
    prompts_max_tokens: int = flag(
        "self:N only; longest prompt to write, in tokens; drop those that do not end",
        256,
    )
    skip: int = flag("rows to pass over first", 0)
    limit: int | None = flag("most rows to read; left out, all", None)
    shard: str | None = flag(
        "such as 3/8: answer the third of eight parts of the prompts alone, so that "
        "eight processes, each with an --out of its own, answer all of them",
        None,
    )
    strict: bool = flag(
        "stop at the first row that cannot be used, but not at prompts that are only "
        "too long; left out, such rows are skipped, counted and explained at the end",
        False,
    )
    chat_template: bool = flag(
        "apply the target's chat template; with --no-chat-template prompts are texts "
        "that the target completes",
        True,
    )
    tokenizer_mode: str = flag(
        "as for `vllm serve`: auto, or such as mistral, for a folder with tekken.json",
        "auto",
    )
    chat_template_kwargs: str = flag(
        "arguments of the chat template as JSON, such as "
        '{"enable_thinking": false}; give `vllm serve` the same',
        "{}",
    )
    max_prompt_tokens: int = flag("longest prompt, in tokens; drop longer ones", 1024)
    max_tokens: int | None = flag(
        "longest answer, in tokens; cut longer ones; left out, 512, or the target's "
        "own limit if that is less",
        None,
    )
    generation_config: str = flag(
        "where the sampling settings that are left out come from, as for `vllm serve`: "
        "auto, the target's generation_config.json; vllm, nowhere; or a folder",
        "auto",
    )
    temperature: float | None = flag(
        "0: greedy; above: sample the answers; left out, the target's default (1 where "
        "it only sets top_p, top_k or min_p), or greedy where it has none",
        None,
    )
    top_p: float | None = flag(
        "sample from the likeliest tokens of this probability; left out, the target's "
        "default or 1 (all)",
        None,
    )
    top_k: int | None = flag(
        "sample from this many of the likeliest tokens; left out, the target's default "
        "or 0 (all)",
        None,
    )
    min_p: float | None = flag(
        "sample tokens of at least this part of the likeliest one's probability; left "
        "out, the target's default or 0 (all)",
        None,
    )
    repetition_penalty: float | None = flag(
        "as in vLLM; left out, the target's default or 1 (none)", None
    )
    presence_penalty: float | None = flag(
        "as in vLLM; left out, the target's default or 0 (none)", None
    )
    frequency_penalty: float | None = flag(
        "as in vLLM; left out, the target's default or 0 (none)", None
    )
    seed: int = flag("to sample with; each prompt gets a seed of its own from it", 0)
    held_out: float = flag(
        "part of the prompts to put into the split `held_out`, 0 to below 1; which "
        "ones follows from their text alone",
        0.02,
    )
    max_num_seqs: int = flag(
        "prompts answered at once, and answers written at once; a kill loses at most "
        "two times as many",
        256,
    )
    max_model_len: int | None = flag(
        "the engine's context in tokens; left out, max_prompt_tokens + max_tokens", None
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag(
        "type that the engine computes in; auto is the target's own", "auto"
    )

    quantization: str | None = flag(
        "as for `vllm serve`, which then has to be given the same; left out, as the "
        "target's weights are",
        None,
    )
    tensor_parallel_size: int = flag("GPUs (or CPU sockets) that share one target", 1)
    data_parallel_size: int = flag(
        "1; run one process with --shard per replica for more", 1
    )
    gpu_memory_utilization: float | None = flag(
        "part of each GPU's memory that the engine takes; left out, vLLM's default",
        None,
    )

    def run(self) -> int:
        from vllm_mtp.data.odd_rows import OddRows
        from vllm_mtp.data.render import Renderer
        from vllm_mtp.data.served_sampling import as_served
        from vllm_mtp.data.store import Store
        from vllm_mtp.drafter.target_facts import TargetFacts
        from vllm_mtp.engine import front_end

        _require_datasets()
        self._require_source()
        self._require_shard()
        self._require_one_replica()
        if self.answers == "given":
            self._require_no_engine()
        machine = self._machine()
        # It writes the finished dataset in seconds; its many bars say nothing.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        target = target_folder(self.target)
        facts = TargetFacts.from_folder(target).model_copy(update={"name": self.target})
        arguments = self._template_arguments()
        chat = front_end(
            target,
            generation_config=self.generation_config,
            tokenizer_mode=self.tokenizer_mode,
            # Refused now, and not once all prompts are read.
            quantization=self.quantization,
            tensor_parallel_size=self.tensor_parallel_size,
        )
        if self.chat_template and chat.is_harmony:
            raise DataError(
                f"--target {self.target}: `vllm serve` writes gpt-oss's conversations "
                "in the harmony format, not by the chat template; `generate` cannot: "
                "use --no-chat-template, with prompts that are in that format already"
            )
        defaults = as_served(chat.sampling_defaults())
        renderer = Renderer(chat, chat_template=self.chat_template, arguments=arguments)
        sampling = self._sampling(defaults)
        store = Store(Path(self.out).expanduser())
        settings = store.check(
            self._settings(
                target,
                sampling,
                target=facts,
                chat_template_sha256=renderer.chat_template_sha256,
                chat_template_kwargs=arguments,
            )
        )
        if store.is_finished:
            print(f"{store.folder} is finished already; nothing to do")
            return 0
        odd = OddRows(strict=self.strict)
        if settings.is_off_policy:
            taken = take_answers(store, settings, renderer, chat.end_token_ids, odd)
            print(report(taken, store.folder, odd.explained()))
            return 0
        with one_engine(target, settings, machine) as start_engine:
            requests, counts = self._requests(
                store, settings, renderer, start_engine, odd
            )
            print(first_prompt(requests[0], renderer))
            print(self._sampling_in_words(sampling, defaults))
            advise(goes_on(store))
            run = answer_prompts(store, settings, start_engine, requests)
        provenance = finish(store, run, requests, counts)
        print(report(provenance, store.folder, odd.explained()))
        return 0

    def _requests(
        self,
        store: "Store",
        settings: "RunSettings",
        renderer: "Renderer",
        start_engine: "StartEngine",
        odd: "OddRows",
    ) -> "tuple[list[Request], PromptCounts]":
        from vllm_mtp.data.prompts import read_prompts
        from vllm_mtp.data.render import prepare
        from vllm_mtp.data.shard import Shard

        if settings.source.writing is not None:
            requests, counts = prepare_written(
                store, settings, renderer, start_engine, odd
            )
        else:
            requests, counts = prepare(
                read_prompts(settings.source, odd),
                renderer,
                settings.max_prompt_tokens,
                odd,
                Shard.parse(settings.source.shard),
            )
        if not requests:
            reasons = "; ".join(odd.explained()) or (
                "the source is empty, --skip passes over all of it, or there are "
                "fewer prompts than shards"
            )
            raise DataError(
                f"--prompts {self.prompts}: nothing to answer: {counts.read} rows "
                f"read; {reasons}. Name a source with prompts that the target takes"
            )
        return requests, counts

    def _require_source(self) -> None:
        from vllm_mtp.data.sources import HF, SELF, require_source
        from vllm_mtp.data.store import Store

        for source, names in ((SELF, _OF_WRITING), (HF, _OF_HF)):
            if not self.prompts.startswith(source):
                self._require_defaults(
                    names,
                    f"only --prompts {source}... reads it, and --prompts is "
                    f"{self.prompts}",
                )
        # A finished folder is finished, also where its source is gone.
        if not Store(Path(self.out).expanduser()).is_finished:
            require_source(self.prompts)

    def _require_shard(self) -> None:
        from vllm_mtp.data.shard import Shard

        try:
            Shard.parse(self.shard)
        except ValueError as error:
            raise DataError(f"--shard: got {self.shard!r}, {error}") from None

    def _require_one_replica(self) -> None:
        if self.data_parallel_size != 1:
            raise DataError(
                f"--data-parallel-size: got {self.data_parallel_size}, expected 1: "
                "vLLM's offline engine has no replicas in one process. Run one process "
                f"per replica, with --shard 1/{max(self.data_parallel_size, 2)} and so "
                "on, each with an --out of its own, and give `train` all of them"
            )

    def _require_no_engine(self) -> None:
        from vllm_mtp.data.sources import LATER, SHAREGPT, TASKS, is_self

        self._require_defaults(_OF_ENGINE, "with --answers given no engine answers")
        if not self.chat_template:
            raise DataError(
                "--no-chat-template: --answers given takes conversations, which the "
                "chat template writes; leave one of the two out"
            )
        if is_self(self.prompts) or self.prompts in (SHAREGPT, TASKS):
            raise DataError(
                f"--prompts {self.prompts}: gives prompts only, and --answers given "
                "needs conversations with their answers; name a JSONL file, "
                f"hf:NAME_OR_PATH or {LATER}"
            )

    def _require_defaults(self, names: Collection[str], why: str) -> None:
        """Refuse flags that nothing would read."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise DataError(
                    f"--{field.name.replace('_', '-')}: got {value}, but {why}; "
                    "leave it out"
                )

    def _machine(self) -> "MachineSettings":
        from pydantic import ValidationError

        from vllm_mtp.data.settings import MachineSettings

        names = ("tensor_parallel_size", "gpu_memory_utilization")
        try:
            return MachineSettings.model_validate(self._fields(*names))
        except ValidationError as error:
            raise DataError(_flag_errors(error)) from None

    def _template_arguments(self) -> dict[str, Any]:
        import json

        try:
            found = json.loads(self.chat_template_kwargs)
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        raise DataError(
            f"--chat-template-kwargs: got {self.chat_template_kwargs!r}, expected a "
            'JSON object such as {"enable_thinking": false}'
        )

    def _sampling(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The flags, behind them the target's defaults, behind them ours."""
        from vllm_mtp.data.served_sampling import NAMES

        if self.answers == "given":
            return {"max_tokens": self.max_tokens or _MAX_TOKENS}
        longest = min(_MAX_TOKENS, defaults.get("max_tokens", _MAX_TOKENS))
        flags = self._fields(*NAMES)
        given = {name: value for name, value in flags.items() if value is not None}
        return defaults | {"max_tokens": longest} | given | {"seed": self.seed}

    def _sampling_in_words(
        self, sampling: dict[str, Any], defaults: dict[str, Any]
    ) -> str:
        from vllm_mtp.data.served_sampling import in_use

        used = {"temperature": 0} | sampling
        names = in_use(used["temperature"])
        if used["temperature"] == 0:
            used["temperature"] = "0 (greedy)"
        told = ", ".join(f"{name} {used[name]}" for name in names if name in used)
        own = [
            name
            for name in names
            if name in defaults
            and getattr(self, name) is None
            and sampling[name] == defaults[name]
        ]
        if not own:
            return f"sampling: {told}"
        return (
            f"sampling: {told}\n  of these the target's own defaults, which `vllm "
            f"serve` applies too: {', '.join(own)} (flags override them; "
            "--generation-config vllm leaves them out, here and there)"
        )

    def _settings(
        self, folder: Path, sampling: dict[str, Any], **found: Any
    ) -> "RunSettings":
        from pydantic import ValidationError

        from vllm_mtp.data.settings import RunSettings
        from vllm_mtp.drafter.target_facts import weights_sample_sha256
        from vllm_mtp.engine import vllm_version

        found |= self._from_flags(folder, sampling) | {
            "vllm": vllm_version(),
            "policy": "off-policy" if self.answers == "given" else "on-policy",
            # Small, so that a kill loses little.
            "part_prompts": self.max_num_seqs,
            "weights_sample_sha256": weights_sample_sha256(folder),
        }
        try:
            return RunSettings.model_validate(found)
        except ValidationError as error:
            raise DataError(_flag_errors(error)) from None

    def _from_flags(self, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        engine = self._fields("dtype", "tokenizer_mode", "max_num_seqs", "quantization")
        if self.generation_config != "vllm":  # tokens that end are the target's then
            engine["generation_config"] = self.generation_config
        names = ("chat_template", "max_prompt_tokens", "held_out")
        return self._fields(*names) | {
            "source": self._source(),
            "sampling": sampling,
            "engine": engine
            | {"max_model_len": self._max_model_len(target, sampling["max_tokens"])},
        }

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def _source(self) -> dict[str, Any]:
        from vllm_mtp.data.sources import HF, is_self

        found = self._fields("prompts", "skip", "limit", "shard")
        if self.prompts.startswith(HF):
            found |= {
                "split": self.prompts_split,
                "column": self.prompts_column,
                "category_column": self.prompts_category_column,
            }
        elif is_self(self.prompts):
            found["writing"] = {
                "temperature": self.prompts_temperature,
                "top_p": self.prompts_top_p,
                "max_tokens": self.prompts_max_tokens,
                "seed": self.seed,
            }
        return found

    def _max_model_len(self, target: Path, max_tokens: int) -> int:
        from vllm_mtp.drafter.target_facts import hf_config_of

        needed = self.max_prompt_tokens + max_tokens
        config = hf_config_of(target).get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or needed
        found = self.max_model_len or needed
        what = (
            f"--max-prompt-tokens {self.max_prompt_tokens} and --max-tokens "
            f"{max_tokens} need a context of {needed} tokens"
        )
        if needed > longest:
            raise DataError(
                f"{what}, but the target's own limit is {longest}; lower them"
            )
        if not needed <= found <= longest:
            raise DataError(
                f"--max-model-len: got {found}, expected {needed} to {longest}: "
                f"{what}, and the target has no more"
            )
        return found


def _require_datasets() -> None:
    """Say that the library is missing now, and not after hours, when it is used."""
    if find_spec("datasets") is None:
        raise DataError(
            "`vllm-mtp generate` needs the package 'datasets', which is not installed; "
            "install it with: pip install 'vllm-mtp[train]' (or only: pip install "
            "datasets)"
        )


def _flag_errors(error: Any) -> str:
    """pydantic's errors with the flags' names."""
    lines = [
        f"--{_flag_of(item['loc'])}: got {item['input']!r}; "
        f"{item['msg'][0].lower()}{item['msg'][1:]}"
        for item in error.errors()
        if item["loc"] != ("part_prompts",)  # no flag; says the same as max_num_seqs
    ]
    return "\n".join(lines)


def _flag_of(location: tuple[str | int, ...]) -> str:
    name = str(location[-1]).replace("_", "-")
    return f"prompts-{name}" if "writing" in location else name
