# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_mtp.cli.targets import target_folder
from vllm_mtp.errors import DataError
from vllm_mtp.flags import flag
from vllm_mtp.interrupts import advise, deferred

if TYPE_CHECKING:
    from vllm_mtp.data.render import Renderer, Request
    from vllm_mtp.data.settings import PromptCounts, Provenance, RunSettings
    from vllm_mtp.data.store import Store


@dataclass
class Generate:
    """Let a target answer prompts with vLLM's offline engine, without a drafter, and
    write prompts and answers as a `datasets` dataset of token ids, to train drafters
    on. A run that was stopped goes on with the same command."""

    target: str = flag("the target's Hugging Face folder or hub name")
    prompts: str = flag(
        "sharegpt; or a JSONL file with `prompt` (text) or `messages` (turns, the last "
        "one the user's) and, if wanted, `category` per line; or hf:NAME_OR_PATH, a "
        "Hugging Face dataset"
    )
    out: str = flag("folder to write; one that holds a stopped run is continued")
    prompts_split: str = flag("hf: only; the dataset's split", "train")
    prompts_column: str = flag(
        "hf: only; the column with texts or lists of turns", "prompt"
    )
    prompts_category_column: str | None = flag(
        "hf: only; the column with categories; left out, the dataset's name is the "
        "category",
        None,
    )
    skip: int = flag("prompts to pass over first", 0)
    limit: int | None = flag("most prompts to read; left out, all", None)
    chat_template: bool = flag(
        "apply the target's chat template; with --no-chat-template prompts are texts "
        "that the target completes",
        True,
    )
    max_prompt_tokens: int = flag("longest prompt, in tokens; drop longer ones", 1024)
    max_tokens: int = flag("longest answer, in tokens; cut longer ones", 512)
    temperature: float = flag("0: greedy; above: sample the answers", 0.0)
    top_p: float = flag("sample from the likeliest tokens of this probability", 1.0)
    top_k: int = flag("sample from this many of the likeliest tokens; 0: all", 0)
    seed: int = flag("to sample with; each prompt gets a seed of its own from it", 0)
    held_out: float = flag(
        "part of the prompts to put into the split `held_out`, 0 to below 1; which "
        "ones follows from their text alone",
        0.02,
    )
    max_num_seqs: int = flag(
        "prompts answered at once, and then written; a stop loses at most these", 256
    )
    max_model_len: int | None = flag(
        "the engine's context in tokens; left out, max_prompt_tokens + max_tokens", None
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag(
        "type that the engine computes in; auto is the target's own", "auto"
    )

    def run(self) -> int:
        from vllm_mtp.data.store import Store

        _require_datasets()
        # It writes the finished dataset in seconds; its many bars say nothing.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        target = target_folder(self.target)
        renderer = self._renderer(target)
        store = Store(Path(self.out).expanduser())
        settings = store.check(self._settings(target, renderer))
        if store.is_finished:
            print(f"{store.folder} is finished already; nothing to do")
            return 0
        requests, counts = self._requests(settings, renderer)
        advise(f"the same command goes on with what is in {store.folder}")
        provenance = _generate(store, settings, target, requests, counts)
        print(report(provenance, store.folder))
        return 0

    def _requests(
        self, settings: "RunSettings", renderer: "Renderer"
    ) -> "tuple[list[Request], PromptCounts]":
        from vllm_mtp.data.prompts import read_prompts
        from vllm_mtp.data.render import prepare

        requests, counts = prepare(
            read_prompts(settings.source), renderer, settings.max_prompt_tokens
        )
        if not requests:
            raise DataError(
                f"--prompts {self.prompts}: nothing to answer: {counts.read} prompts "
                f"read, {counts.too_long_dropped} of them longer than "
                f"--max-prompt-tokens {self.max_prompt_tokens} or without any token; "
                "name a source with shorter prompts, or raise the limit"
            )
        return requests, counts

    def _renderer(self, target: Path) -> "Renderer":
        from transformers import AutoTokenizer

        from vllm_mtp.data.render import Renderer

        try:
            tokenizer = AutoTokenizer.from_pretrained(target)
        except (OSError, ValueError) as error:
            raise DataError(
                f"--target {self.target}: its tokenizer cannot be loaded ({error})"
            ) from None
        return Renderer(tokenizer, chat_template=self.chat_template)

    def _settings(self, target: Path, renderer: "Renderer") -> "RunSettings":
        from pydantic import ValidationError

        from vllm_mtp.data.settings import RunSettings
        from vllm_mtp.drafter.target_facts import TargetFacts, weights_sample_sha256
        from vllm_mtp.engine import vllm_version

        facts = TargetFacts.from_folder(target).model_copy(update={"name": self.target})
        found = self._from_flags(target) | {
            "target": facts,
            "chat_template_sha256": renderer.chat_template_sha256,
            "vllm": vllm_version(),
            # Small, so that a kill loses little.
            "part_prompts": self.max_num_seqs,
            "weights_sample_sha256": weights_sample_sha256(target),
        }
        try:
            return RunSettings.model_validate(found)
        except ValidationError as error:
            raise DataError(_flag_errors(error)) from None

    def _from_flags(self, target: Path) -> dict[str, Any]:
        engine = self._fields("dtype", "max_num_seqs")
        return self._fields("chat_template", "max_prompt_tokens", "held_out") | {
            "source": self._source(),
            "sampling": self._fields(
                "max_tokens", "temperature", "top_p", "top_k", "seed"
            ),
            "engine": engine | {"max_model_len": self._max_model_len(target)},
        }

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def _source(self) -> dict[str, Any]:
        found = self._fields("prompts", "skip", "limit")
        if self.prompts.startswith("hf:"):
            found |= {
                "split": self.prompts_split,
                "column": self.prompts_column,
                "category_column": self.prompts_category_column,
            }
        return found

    def _max_model_len(self, target: Path) -> int:
        from transformers import AutoConfig

        needed = self.max_prompt_tokens + self.max_tokens
        config = AutoConfig.from_pretrained(target).get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or needed
        found = self.max_model_len or needed
        if not needed <= found <= longest:
            raise DataError(
                f"--max-prompt-tokens {self.max_prompt_tokens} and --max-tokens "
                f"{self.max_tokens} need a context of {needed} tokens; --max-model-len "
                f"is {found}, and the target's own limit is {longest}. Lower the first "
                "two, or set the third between"
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
        f"--{str(item['loc'][-1]).replace('_', '-')}: got {item['input']!r}; "
        f"{item['msg'][0].lower()}{item['msg'][1:]}"
        for item in error.errors()
        if item["loc"] != ("part_prompts",)  # no flag; says the same as max_num_seqs
    ]
    return "\n".join(lines)


def _generate(
    store: "Store",
    settings: "RunSettings",
    target: Path,
    requests: "Sequence[Request]",
    counts: "PromptCounts",
) -> "Provenance":
    """Answer what is missing, and make the dataset."""
    from vllm_mtp.data.generation import chunks
    from vllm_mtp.data.settings import RunFile
    from vllm_mtp.data.split import digest_of

    digest = digest_of([request.prompt_id for request in requests])
    run = RunFile(settings=settings, prompts_sha256=digest)
    store.start(run)
    parts = chunks(requests, settings.chunk_prompts)
    todo = [len(part) for i, part in enumerate(parts) if not store.has_part(i)]
    print(f"{len(requests):,} prompts in {len(parts)} parts, {len(todo)} of them to do")
    if todo:
        _answer(store, settings, target, parts, todo)
    return store.finish(len(parts), run, counts, _versions(settings))


def _answer(
    store: "Store",
    settings: "RunSettings",
    target: Path,
    parts: "Sequence[Sequence[Request]]",
    todo: Sequence[int],
) -> None:
    """Answer the parts that are missing, of which `todo` has the sizes."""
    from vllm_mtp.data.answerer import answering
    from vllm_mtp.data.generation import answer_missing
    from vllm_mtp.data.progress import Progress

    prompts = [len(request.token_ids) for part in parts for request in part]
    with (
        answering(target, settings.engine, settings.sampling) as answerer,
        Progress(len(prompts), todo, sum(prompts)) as progress,
        # An exception inside vLLM's step would be another one when it comes out.
        deferred(),
    ):
        answer_missing(store, parts, answerer, progress.answered, progress.part_done)


def _versions(settings: "RunSettings") -> dict[str, str]:
    from importlib.metadata import version

    return {
        "vllm": settings.vllm,
        "transformers": version("transformers"),
        "vllm_mtp": version("vllm-mtp"),
    }


def report(provenance: "Provenance", folder: Path) -> str:
    """The table that the command ends with."""
    prompts = provenance.prompts
    rows = [
        ("prompts read", f"{prompts.read:,}"),
        ("duplicates dropped", f"{prompts.duplicates_dropped:,}"),
        ("too long, dropped", f"{prompts.too_long_dropped:,}"),
        ("empty answers dropped", f"{provenance.empty_answers_dropped:,}"),
    ] + [
        (
            name,
            (
                f"{split.rows:,} rows, {split.tokens:,} tokens, "
                f"{split.answer_tokens:,} of them the target's"
            ),
        )
        for name, split in provenance.splits.items()
    ]
    table = "\n".join(f"  {name:<21} {value}" for name, value in rows)
    return f"\n{table}\n\nwritten to {folder}"
