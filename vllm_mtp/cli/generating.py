# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-mtp generate`` does once its flags are read."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mtp.errors import DataError
from vllm_mtp.interrupts import advise, deferred

if TYPE_CHECKING:
    from vllm_mtp.data.answerer import VLLMAnswerer
    from vllm_mtp.data.odd_rows import OddRows
    from vllm_mtp.data.render import Renderer, Request
    from vllm_mtp.data.settings import (
        MachineSettings,
        PromptCounts,
        Provenance,
        RunFile,
        RunSettings,
    )
    from vllm_mtp.data.store import Row, Store

    StartEngine = Callable[[], VLLMAnswerer]

_SHOWN = 1000  # characters of the first prompt
_KINDS = 20  # named at most


@contextmanager
def one_engine(
    target: Path, settings: "RunSettings", machine: "MachineSettings"
) -> "Iterator[StartEngine]":
    """An engine that starts when it is first asked for: a run that goes on may need
    none. It is gone when the ``with`` block ends."""
    from vllm_mtp.data.answerer import answering

    with ExitStack() as stack:
        yield cache(
            lambda: stack.enter_context(
                answering(target, settings.engine, settings.sampling, machine)
            )
        )


def goes_on(store: "Store") -> str:
    """What to do after an interrupt, once something is in the folder."""
    return f"the same command goes on with what is in {store.folder}"


def prepare_written(
    store: "Store",
    settings: "RunSettings",
    renderer: "Renderer",
    start_engine: "StartEngine",
    odd: "OddRows",
) -> "tuple[list[Request], PromptCounts]":
    """Have the target write the prompts that are missing, and prepare all of them."""
    from tqdm import tqdm

    from vllm_mtp.data.render import prepare
    from vllm_mtp.data.settings import RunFile, SamplingSettings
    from vllm_mtp.data.written import WrittenFile, numbers_of, prompts_of, write_missing

    source, writing = settings.source, settings.source.writing
    assert writing is not None
    turn = renderer.user_turn()
    before = renderer.tokenize(turn.before)
    longest, needed = settings.engine.max_model_len, len(before) + writing.max_tokens
    if needed > longest:
        raise DataError(
            f"--prompts-max-tokens: got {writing.max_tokens}, behind {len(before)} "
            f"tokens of the chat template, but the engine's context is {longest}; "
            "lower it, or raise --max-model-len"
        )
    numbers, others = numbers_of(source)
    file = WrittenFile(store.folder)
    written = file.read()
    missing = [number for number in numbers if number not in written]
    if missing:
        store.start(RunFile(settings=settings, prompts_sha256=""))
        file.write(written.values())  # without a last line that a kill has cut
        advise(goes_on(store))
        print(
            f"{len(numbers):,} prompts, {len(missing):,} of them to be written by the "
            f"target behind:\n{turn.before}\n"
        )
        engine = start_engine()
        # A log file shall not get a line per second.
        every = 1.0 if sys.stderr.isatty() else 30.0
        with (
            tqdm(
                total=len(missing), unit="prompt", desc="writing", mininterval=every
            ) as bar,
            deferred(),  # as for answers
        ):
            written |= write_missing(
                file,
                missing,
                before,
                engine,
                SamplingSettings(**writing.model_dump()),
                renderer.decode,
                settings.part_rows,
                bar.update,
            )
    prompts = prompts_of(
        written, numbers, source.prompts, turn, renderer.special_tokens, odd
    )
    requests, counts = prepare(prompts, renderer, settings.max_prompt_tokens, odd)
    return requests, counts.model_copy(
        update={"read": counts.read + others, "in_other_shards": others}
    )


def answer_prompts(
    store: "Store",
    settings: "RunSettings",
    start_engine: "StartEngine",
    requests: "Sequence[Request]",
) -> "RunFile":
    """Answer what is missing.

    Returns:
        What was asked for, for `finish`.
    """
    from vllm_mtp.data.settings import RunFile
    from vllm_mtp.data.split import digest_of

    order = [request.prompt_id for request in requests]
    run = RunFile(settings=settings, prompts_sha256=digest_of(order))
    store.start(run)
    done = store.answered({each.prompt_id: each.token_ids for each in requests})
    missing = [each for each in requests if each.prompt_id not in done]
    print(f"{len(requests):,} prompts, {len(missing):,} of them to answer")
    if missing:
        _answer(store, settings, start_engine(), requests, missing)
    return run


def finish(
    store: "Store",
    run: "RunFile",
    requests: "Sequence[Request]",
    counts: "PromptCounts",
) -> "Provenance":
    """Make the dataset of all answers."""
    order = [request.prompt_id for request in requests]
    return store.finish(order, run, counts, _versions(run.settings))


def _answer(
    store: "Store",
    settings: "RunSettings",
    answerer: "VLLMAnswerer",
    requests: "Sequence[Request]",
    missing: "Sequence[Request]",
) -> None:
    """Answer those of a run's requests that are missing."""
    from vllm_mtp.data.generation import answer_missing
    from vllm_mtp.data.progress import Progress

    rows = settings.part_rows
    with (
        Progress(requests, missing, settings.engine.max_num_seqs) as progress,
        # An exception inside vLLM's step would be another one when it comes out.
        deferred(),
    ):
        answer_missing(store, missing, answerer, rows, progress.answered)


def take_answers(
    store: "Store",
    settings: "RunSettings",
    renderer: "Renderer",
    ends: frozenset[int],
    odd: "OddRows",
) -> "Provenance":
    """Make the dataset of answers that the source has."""
    from itertools import chain

    from vllm_mtp.data.given import GivenAnswers, keep
    from vllm_mtp.data.prompts import read_prompts

    given = GivenAnswers(renderer, ends, settings, odd)
    rows = given.rows(read_prompts(settings.source, odd, answered=True))
    first = next(rows, None)
    if first is None:
        reasons = "; ".join(odd.explained()) or "the source is empty"
        raise DataError(
            f"--prompts {settings.source.prompts}: no answer to take: "
            f"{given.counts.read} rows read; {reasons}. Name a source whose "
            "conversations end with the assistant's turn"
        )
    print(_first_text(first, renderer))
    run = keep(chain([first], rows), store, settings)
    return store.finish(None, run, given.counts, _versions(settings))


def _first_text(row: "Row", renderer: "Renderer") -> str:
    """The first text as it will be trained on, for the user to look at."""
    ids, spans = row["input_ids"], row["loss_spans"]
    start = spans[0][0] if spans else len(ids)
    prompt, answer = renderer.decode(ids[:start]), renderer.decode(ids[start:])
    return (
        f"the first prompt, {start:,} tokens:\n{prompt[-_SHOWN:]}\n\n"
        f"its answer, {len(ids) - start:,} tokens:\n{answer[:_SHOWN]}\n"
    )


def _versions(settings: "RunSettings") -> dict[str, str]:
    from importlib.metadata import version

    return {
        "vllm": settings.vllm,
        "transformers": version("transformers"),
        "vllm_mtp": version("vllm-mtp"),
    }


def first_prompt(request: "Request", renderer: "Renderer") -> str:
    """The first prompt as the target gets it, for the user to look at."""
    text = renderer.decode(request.token_ids)
    more = f" ... ({len(text):,} characters)" if len(text) > _SHOWN else ""
    return (
        f"the first prompt, {len(request.token_ids):,} tokens:\n{text[:_SHOWN]}{more}\n"
    )


def report(provenance: "Provenance", folder: Path, odd: Sequence[str] = ()) -> str:
    """The table that the command ends with, and why rows were left out."""
    from vllm_mtp.data.store import kinds_not_held_out

    prompts = provenance.prompts
    whose = "answers" if provenance.settings.is_off_policy else "the target's"
    rows = [
        ("rows read", f"{prompts.read:,}"),
        ("duplicates dropped", f"{prompts.duplicates_dropped:,}"),
        ("too long, dropped", f"{prompts.too_long_dropped:,}"),
        ("odd, skipped", f"{sum(prompts.odd_skipped.values()):,}"),
        ("in other shards", f"{prompts.in_other_shards:,}"),
        ("empty answers dropped", f"{provenance.empty_answers_dropped:,}"),
    ] + [
        (
            name,
            (
                f"{split.rows:,} rows, {split.tokens:,} tokens, "
                f"{split.answer_tokens:,} of them {whose}"
            ),
        )
        for name, split in provenance.splits.items()
    ]
    if provenance.settings.source.shard is None:
        rows = [row for row in rows if row[0] != "in other shards"]
    table = "\n".join(f"  {name:<21} {value}" for name, value in rows)
    if provenance.settings.held_out and (missing := kinds_not_held_out(folder)):
        # A data set may have a category for each row.
        named = ", ".join(missing[:_KINDS]) + (", ..." if missing[_KINDS:] else "")
        table += f"\n\n  no row held out of: {named} (--held-out larger, or more rows)"
    reasons = "".join(f"\n    {line}" for line in odd)
    if reasons:
        heading = "rows left out (--strict stops at the first, unless too long)"
        if provenance.settings.source.writing is not None:
            heading = "written prompts left out"
        reasons = f"\n\n  {heading}:{reasons}"
    return f"\n{table}{reasons}\n\nwritten to {folder}"
