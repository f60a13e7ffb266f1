# SPDX-License-Identifier: Apache-2.0
"""The folder that ``vllm-mtp generate`` writes.

While a run goes on::

    run.json            what was asked for (`settings.RunFile`)
    parts/000000.jsonl  some prompts with their answers, in the order they ended

Finished::

    dataset_dict.json, train/, held_out/   for ``datasets.load_from_disk``
    generation.json                        `settings.Provenance`; written last
    run.json

Every file is written under another name first and renamed, so it is whole or it is
not there. The columns of a row:

    prompt_id      32 hex digits, see `split.prompt_id`
    split_id       that of the prompt whose side of the split this one shares, as a
                   rule its own; folders of earlier versions have no such column
    category       kind of prompt
    input_ids      the prompt's tokens, then the answer's, with the token that ended it
    loss_spans     list of [start, end): the tokens of ``input_ids`` that are the
                   target's own, or of an answer that was given
    finish_reason  "stop", or "length" where ``max_tokens`` cut the answer off
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_mtp.data.settings import (
    PromptCounts,
    Provenance,
    RunFile,
    RunSettings,
    SplitCounts,
)
from vllm_mtp.data.split import is_held_out
from vllm_mtp.drafter.target_facts import TargetFacts, weights_sample_sha256
from vllm_mtp.errors import DataError
from vllm_mtp.files import unfinished, write_whole, writing

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, HELD_OUT = SPLITS = ("train", "held_out")
GENERATION_FILE = "generation.json"
RUN_FILE = "run.json"
_PARTS = "parts"
_CACHE = ".cache-"

_M = TypeVar("_M", bound=BaseModel)


class Row(TypedDict):
    """One row, see above; an empty answer has no loss span."""

    prompt_id: str
    split_id: NotRequired[str]
    category: str
    input_ids: list[int]
    loss_spans: list[list[int]]
    finish_reason: str


def split_id_of(row: Mapping[str, Any]) -> str:
    """What `is_held_out` decided a row's side by, in folders of any version."""
    return row.get("split_id") or row["prompt_id"]


class _Place(NamedTuple):
    """Where a row begins, and what its side of the split hangs on."""

    path: Path
    begin: int
    split_id: str


def read_split(folder: str | os.PathLike[str], split: str = TRAIN) -> "Dataset":
    """Read one split of a finished folder.

    Args:
        folder: What ``vllm-mtp generate --out`` wrote.
        split: ``"train"`` or ``"held_out"``.

    Raises:
        DataError: The folder is not ours or not finished, has no such split, or the
            split has no rows.
    """
    import datasets

    counts = read_provenance(folder).splits
    if split not in counts:
        raise DataError(f"{folder}: no split {split!r}; it has {', '.join(counts)}")
    if not counts[split].rows:
        raise DataError(
            f"{folder}: the split {split!r} has no rows; generate with more prompts, "
            "or with another --held-out"
        )
    try:
        rows = datasets.load_from_disk(str(Path(folder, split)))
        _require_tokens(rows, f"{folder}/{split}", read_provenance(folder))
        return rows
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder}/{split}: cannot be read ({error}); generate it again"
        ) from None


def kinds_not_held_out(folder: str | os.PathLike[str]) -> list[str]:
    """The categories of which all rows are there to train on.

    A side follows from a hash, so of few rows of a kind none may be held out.

    Raises:
        DataError: As in `read_split`.
    """
    counts = read_provenance(folder).splits
    kinds = {
        split: dict.fromkeys(read_split(folder, split)["category"])
        for split in SPLITS
        if counts[split].rows
    }
    return [
        name for name in kinds.get(TRAIN, ()) if name not in kinds.get(HELD_OUT, ())
    ]


def _require_tokens(rows: "Dataset", where: str, provenance: Provenance) -> None:
    """Every id has a row in the target's embedding; else torch only says "index"."""
    import pyarrow.compute as pc

    size = provenance.settings.target.vocab_size
    for chunk in rows.data.column("input_ids").chunks:
        ends = pc.min_max(pc.list_flatten(chunk)).as_py()
        if ends["min"] is not None and not 0 <= ends["min"] <= ends["max"] < size:
            wrong = ends["min"] if ends["min"] < 0 else ends["max"]
            raise DataError(
                f"{where}: holds the token {wrong}, and the target's embedding has "
                f"{size} rows; generate it again with the target's own tokenizer"
            )


def read_provenance(folder: str | os.PathLike[str]) -> Provenance:
    """Read how a finished folder was made.

    Raises:
        DataError: The folder is not ours or not finished.
    """
    path = Path(folder, GENERATION_FILE)
    if path.is_file():
        return _read(path, Provenance)
    if Path(folder, RUN_FILE).is_file():
        raise DataError(
            f"{folder}: not finished (it has {RUN_FILE} and no {GENERATION_FILE}); run "
            "the same `vllm-mtp generate` command again to continue"
        )
    raise DataError(
        f"{folder}: no {GENERATION_FILE}; expected a folder that `vllm-mtp generate "
        "--out` wrote"
    )


def require_made_by(
    folder: str | os.PathLike[str], facts: TargetFacts, target: Path | None = None
) -> None:
    """Raise unless the answers are those of this target.

    Args:
        folder: What ``vllm-mtp generate --out`` wrote.
        facts: The target's.
        target: The target's folder; with it, two fine-tunes of one model are told
            apart too, if the answers are new enough to say which it was.

    Raises:
        DataError: Another target made them, or the folder is not ours.
    """
    settings = read_provenance(folder).settings
    made_by = settings.target
    differing = [
        key
        for key, value in made_by
        if key not in ("name", "weights_fingerprint") and value != getattr(facts, key)
    ]
    if _differ(made_by.weights_fingerprint, facts.weights_fingerprint):
        differing.append("weights_fingerprint")
    sample = weights_sample_sha256(target) if target else None
    if _differ(settings.weights_sample_sha256, sample):
        differing.append("weights_sample_sha256 (the weights' contents)")
    if differing:
        raise DataError(
            f"{folder}: the answers are those of the target {made_by.name!r}, got the "
            f"target {facts.name!r}; they differ in {', '.join(differing)}. Use that "
            "target, or generate answers with this one"
        )


def _differ(theirs: str | None, ours: str | None) -> bool:
    """Whether both are known and not the same."""
    return theirs != ours and None not in (theirs, ours)


class Store:
    """A folder that a run writes into.

    Args:
        folder: Made by `start`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = folder / _PARTS

    @property
    def is_finished(self) -> bool:
        return (self.folder / GENERATION_FILE).is_file()

    def check(self, settings: RunSettings) -> RunSettings:
        """Refuse settings that are not those of the run in this folder.

        Returns:
            Those to go on with: a folder keeps its own size of parts.

        Raises:
            DataError: Names each differing key; or the folder holds something else.
        """
        path = self.folder / RUN_FILE
        if path.is_file():
            found = _read(path, RunFile).settings
            self._refuse(found.differences(settings), found.sampling_flags(settings))
            return found
        if self.folder.exists() and not self._is_blank():
            raise DataError(
                f"--out {self.folder}: exists and is not a folder of `vllm-mtp "
                "generate`; name another"
            )
        return settings

    def _is_blank(self) -> bool:
        # A run that was killed at its very start leaves a file not yet renamed.
        name = unfinished(self.folder / RUN_FILE).name
        return self.folder.is_dir() and all(
            path.name == name for path in self.folder.iterdir()
        )

    def start(self, run: RunFile) -> None:
        """Begin a run, or go on with it.

        Raises:
            DataError: The folder holds a run of other settings or prompts.
        """
        self.check(run.settings)
        path = self.folder / RUN_FILE
        if not path.is_file():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, run.model_dump_json(indent=2) + "\n")
            return
        found = _read(path, RunFile).prompts_sha256
        if not found:  # so far the target was writing its prompts
            write_whole(path, run.model_dump_json(indent=2) + "\n")
        elif run.prompts_sha256 not in ("", found):
            self._refuse(
                [
                    (
                        f"prompts_sha256: the folder has {found!r}, this run has "
                        f"{run.prompts_sha256!r} (the source's contents changed)"
                    )
                ]
            )

    def _refuse(self, differences: list[str], flags: str = "") -> None:
        if differences:
            # Settings that are left out are the target's; once they were constants.
            how = f"\nOf sampling, these flags go on with it: {flags}" if flags else ""
            raise DataError(
                f"--out {self.folder}: holds a run with other settings:\n  "
                + "\n  ".join(differences)
                + how
                + "\nUse the settings that it has, or name another folder"
            )

    def answered(self, prompts: Mapping[str, Sequence[int]]) -> set[str]:
        """The prompts that have an answer here.

        Settings are compared, and the chat template; but a template may print today's
        date, and the tokenizer or vLLM's own rendering may have changed.

        Args:
            prompts: All of the run as they are now: identifiers and token ids.

        Raises:
            DataError: A prompt was other tokens; names the part.
        """
        found: set[str] = set()
        for path in self._part_files():
            with path.open(encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    self._require_same_prompt(path, row, prompts[row["prompt_id"]])
                    found.add(row["prompt_id"])
        return found

    def _require_same_prompt(self, path: Path, row: Row, now: Sequence[int]) -> None:
        # Behind the prompt of an empty answer comes at most the token that ended it.
        spans = row["loss_spans"] or [[len(now), 0]]
        if row["input_ids"][: spans[0][0]] != list(now):
            raise DataError(
                f"{path}: a prompt of it was rendered as other token ids than now "
                "(does the chat template print the date, or has the tokenizer "
                "changed?), so the answers would not belong together; render as then "
                "(--chat-template-kwargs), remove this part to answer it again, or "
                "name another folder as --out"
            )

    def write_part(self, rows: Sequence[Row]) -> None:
        """Store some rows, all of them or, if killed, none."""
        with writing(self._parts):
            self._parts.mkdir(exist_ok=True)
        last = [int(path.stem) for path in self._part_files()[-1:]]
        path = self._parts / f"{sum(last) + len(last):06d}.jsonl"
        lines = (json.dumps(row, separators=(",", ":")) for row in rows)
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def _part_files(self) -> list[Path]:
        return sorted(self._parts.glob("*.jsonl"))

    def _places(self) -> Iterator[tuple[str, _Place]]:
        """Each row's prompt, and where it begins: rows are more than memory holds."""
        for path in self._part_files():
            begin = 0
            with path.open("rb") as lines:
                for line in lines:
                    row = json.loads(line)
                    yield row["prompt_id"], _Place(path, begin, split_id_of(row))
                    begin += len(line)

    def discard_parts(self) -> None:
        """Begin anew."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def finish(
        self,
        order: Sequence[str] | None,
        run: RunFile,
        prompts: PromptCounts,
        versions: dict[str, str],
    ) -> Provenance:
        """Make the dataset of all parts, and remove them.

        Args:
            order: The identifiers of all prompts, in the order of the rows; None: as
                they were written, and then a prompt may have several.
            run: What was asked for.
            prompts: What became of them.
            versions: Of what answered.
        """
        with writing(self.folder):
            counts = self._write_dataset(order, run.settings.held_out)
        provenance = Provenance(
            settings=run.settings,
            prompts_sha256=run.prompts_sha256,
            versions=versions,
            prompts=prompts,
            empty_answers_dropped=prompts.kept - sum(c.rows for c in counts.values()),
            splits=counts,
        )
        text = provenance.model_dump_json(indent=2) + "\n"
        write_whole(self.folder / GENERATION_FILE, text)
        shutil.rmtree(self._parts)
        return provenance

    def _write_dataset(
        self, order: Sequence[str] | None, held_out: float
    ) -> dict[str, SplitCounts]:
        from datasets import DatasetDict

        for pattern in (*SPLITS, f"{_CACHE}*"):  # of a run that was killed here
            for folder in self.folder.glob(pattern):
                shutil.rmtree(folder)
        # Not the user's cache: that one is looked up by the generator's arguments and
        # would give an older run's rows.
        found = list(self._places())
        if order is not None:
            place_of = dict(found)
            found = [(identifier, place_of[identifier]) for identifier in order]
        sides: dict[str, list[_Place]] = {split: [] for split in SPLITS}
        for _, place in found:
            side = HELD_OUT if is_held_out(place.split_id, held_out) else TRAIN
            sides[side].append(place)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=_CACHE) as cache:
            splits = {
                split: _dataset(side, split, cache) for split, side in sides.items()
            }
            # Without a number, an empty split gets no file and cannot be loaded.
            shards = {name: None if rows else 1 for name, rows in splits.items()}
            DatasetDict(splits).save_to_disk(str(self.folder), num_shards=shards)
            return {split: _count(rows) for split, rows in splits.items()}


def _row_at(place: _Place) -> Row:
    with place.path.open("rb") as file:
        file.seek(place.begin)
        row: Row = json.loads(file.readline())
    return row | {"split_id": place.split_id}


def _dataset(places: Sequence[_Place], split: str, cache: str) -> "Dataset":
    from datasets import Dataset

    def rows() -> Iterator[Row]:
        found = map(_row_at, places)
        return (row for row in found if row["loss_spans"])

    if next(rows(), None) is None:  # which `from_generator` refuses
        columns: dict[str, list[Any]] = {name: [] for name in _features()}
        return Dataset.from_dict(columns, features=_features())
    return Dataset.from_generator(
        rows, features=_features(), cache_dir=cache, fingerprint=split
    )


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        {
            "prompt_id": Value("string"),
            "split_id": Value("string"),
            "category": Value("string"),
            "input_ids": List(Value("int32")),
            "loss_spans": List(List(Value("int32"))),
            "finish_reason": Value("string"),
        }
    )


def _count(rows: "Dataset") -> SplitCounts:
    tokens = answer_tokens = 0
    for row in rows.select_columns(["input_ids", "loss_spans"]):
        tokens += len(row["input_ids"])
        answer_tokens += sum(end - start for start, end in row["loss_spans"])
    return SplitCounts(rows=len(rows), tokens=tokens, answer_tokens=answer_tokens)


def _read(path: Path, model: type[_M]) -> _M:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except ValidationError as error:
        raise DataError(
            f"{path}: not a file that this version of vllm-mtp wrote ({error}); use "
            "the version that wrote it, or generate into another folder"
        ) from None
