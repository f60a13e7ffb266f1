# SPDX-License-Identifier: Apache-2.0
"""``README.md`` of a drafter's folder: a Hugging Face model card."""

import json
import shlex
from collections.abc import Iterable
from itertools import groupby

from huggingface_hub import ModelCard, ModelCardData

from vllm_mtp.drafter.config import LAST_HIDDEN, DrafterConfig, SharedLayerConfig
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.drafter.layout import WINDOW_STEP
from vllm_mtp.drafter.served import unserved_text
from vllm_mtp.evaluation.offline import OfflineResult
from vllm_mtp.evaluation.report import markdown
from vllm_mtp.markdown import plain, table
from vllm_mtp.plugin import METHOD
from vllm_mtp.sharing.names import is_repo_id, public_text
from vllm_mtp.sharing.provenance import (
    DataRecord,
    DrafterProvenance,
    TrainingRecord,
    utc,
    without_paths,
)
from vllm_mtp.sharing.speed import SpeedRecord, steps_text

CARD_FILE = "README.md"

_MARK = (
    "<!-- Made by vllm-mtp from the other files of this folder, and made anew by it.\n"
    "To write your own text, remove this comment. -->"
)
_TAGS = ["speculative-decoding", "vllm", "vllm-mtp", METHOD.replace("_", "-")]
_TERMS = {
    "ce_weight": "cross-entropy on the target's text",
    "kl_weight": "KL divergence from the target's likeliest tokens",
    "tv_weight": "total variation distance to the same",
    "acceptance_weight": "minus the drafts that are accepted, per position",
    "feature_weight": "feature loss of own layers",
}
_MEASURES = """\
Offline, on {answers} (`evaluation.json`). In simulated decoding there is
one draft per decoding step, as in serving, and its acceptance length (AL) is what vLLM
counts. Teacher-forced, there is a draft behind every token; the teacher-forced length
(TFL) is another number, mostly a higher one. A draft is accepted up to the first token
that is not the target's own. Both lengths count the bonus token that the target gives
in every step, so 1 means that nothing was accepted."""
_LIMITS = """\
- It drafts for this target only. One of other shapes is refused; a fine-tune of it has
  the same shapes and is taken, but gets fewer drafts accepted.
- Texts unlike those above may get other acceptance. Acceptance alone is no speed-up:
  that depends also on the draft's time, the batch size and the machine.
- Drafts never decide about the text: the target verifies each of them.
- What the method does not serve (such as several GPUs per engine or MLA targets) is
  listed in vllm-mtp's README; `vllm-mtp doctor` checks your vLLM."""


def make_card(
    config: DrafterConfig,
    provenance: DrafterProvenance | None = None,
    evaluation: OfflineResult | None = None,
    speed: SpeedRecord | None = None,
    *,
    name: str = "drafter",
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Write a drafter's card.

    Args:
        config: The drafter's.
        provenance: How it was made, if that is known.
        evaluation: Its acceptance, if that is known.
        speed: What a benchmark found, if there was one.
        name: Of its folder.
        repo_id: Hub repository that it can be had from; None for from a folder.
        license: Of the weights; default the target's, if that is known.
    """
    provenance = provenance and without_paths(provenance)
    target = _target_name(config, provenance)
    known = provenance.target if provenance else None
    data = ModelCardData(
        base_model=target if is_repo_id(target) else None,
        library_name="vllm-mtp",
        license=license or (known.license if known else None),
        pipeline_tag="text-generation",
        tags=list(_TAGS),
    )
    title = repo_id.rpartition("/")[2] if repo_id else name
    model = repo_id or f"./{name}"
    sections = [
        _MARK,
        f"# {title}",
        _introduction(config, target, provenance),
        _use(config, target, model),
        _acceptance(evaluation, provenance),
        _speed(speed),
        _design(config, target, provenance, speed),
        _training(provenance),
        _adapter(provenance),
        _check(config, target, model),
        f"## Limits\n\n{_LIMITS}",
        _made_with(provenance),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def is_made(text: str) -> bool:
    """Whether a card is ours, and no person's."""
    return _MARK.splitlines()[0] in text


def license_of(text: str) -> str | None:
    """The license that a card of ours names."""
    found = ModelCard(text).data.get("license")
    return found if isinstance(found, str) else None


def serve_command(target: str, model: str, k: int) -> str:
    """The shell command that serves a target with a drafter."""
    settings = json.dumps(_settings(model, k), separators=(",", ":"))
    return (
        f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(settings)}"
    )


def layers_text(config: DrafterConfig) -> str:
    """The layers as `vllm-mtp init --layers` takes them."""
    runs = groupby(
        enumerate(config.layers),
        # MLP layers have none; their number is all that there is to say.
        key=lambda item: (
            item[1].kind,
            getattr(item[1], "target_layer", item[0]) - item[0],
        ),
    )
    parts, before = [], ""
    for (kind, _), run in runs:
        numbers = [getattr(layer, "target_layer", None) for _, layer in run]
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        if kind == "mlp":
            span = f"{len(numbers)}"
        parts.append(span if kind == before else f"{kind}:{span}")
        before = kind
    return ",".join(parts)


def rows_text(config: DrafterConfig) -> str:
    """The rows of a draft, and how they run."""
    if config.chain is not None:
        return "a chain: one forward for each, on the token drafted before it"
    if config.input == "boundary":
        return "every one a row of the boundary hidden state"
    extra = f"{config.extra_rows} extra rows, " if config.extra_rows else ""
    mask = ", bidirectional" if config.block_mask == "bidirectional" else ""
    return f"1 anchor, {extra}{config.num_placeholders} placeholders{mask}"


def boundary_text(config: DrafterConfig) -> str:
    """Which hidden states of the target are read at the last token of the prefix."""
    layers = list(config.boundary_layers)
    parts = []
    if config.reads_last_boundary:
        mix = f"a learnt mix of the streams behind target layers {layers}"
        one = f"the stream behind target layer {layers}"
        parts.append((mix if len(layers) > 1 else one) if layers else "the last one")
    bound = [i for i in config.boundary_sources if i >= 0 and i not in layers]
    if bound:
        parts.append(f"the streams behind target layers {bound}, by layers bound there")
    return "; ".join(parts) or "none"


def cache_text(config: DrafterConfig) -> str:
    """Whose KV cache is read, and how often in a draft of all positions."""
    number, readers = len(config.layers), len(config.readers)
    if not readers:
        return "no layer reads the target's"
    who = f"each of its {number} layers reads"
    if readers < number:
        who = f"{readers} of its {number} layers read"
    times = config.num_speculative_tokens if config.chain else 1
    return f"{who} a target layer's" + f", {times} times over" * (times > 1)


def head_text(config: DrafterConfig) -> str:
    """What makes logits."""
    if config.lm_head == "own":
        return f"{config.num_speculative_tokens} of its own, one for each position"
    return "the target's"


def placeholders_text(config: DrafterConfig) -> str:
    """What stands at the positions behind the anchor."""
    if not config.num_placeholders:
        return "none"
    if (noise := config.noise) is None:
        return "trained vectors"
    return (
        f"the target's embeddings of the tokens {list(noise.token_ids)}, drawn from "
        f"{noise.low:,} to {noise.high - 1:,}"
    )


def prefix_text(config: DrafterConfig) -> str:
    """What a draft reads of the prefix's keys and values."""
    if not config.readers:
        return "nothing: no layer reads a cache"
    window = config.prefix_window
    if window is None:
        return "all of it"
    return (
        f"the first {WINDOW_STEP} tokens and the last {window:,} to "
        f"{window + WINDOW_STEP - 1:,}"
    )


def _settings(model: str, k: int) -> dict[str, str | int]:
    return {"method": METHOD, "model": model, "num_speculative_tokens": k}


def _target_name(config: DrafterConfig, provenance: DrafterProvenance | None) -> str:
    known = provenance.target.name if provenance else None
    return known or public_text(config.target.name or "TARGET")


def _introduction(
    config: DrafterConfig, target: str, provenance: DrafterProvenance | None
) -> str:
    if provenance is None:
        made = "How it was made is not recorded."
    elif provenance.adapter is not None:
        made = (
            f"It was imported from the PEFT adapter `{provenance.adapter.name}`, as it "
            "was trained elsewhere."
        )
    elif provenance.training is None:
        made = "**It is untrained**, a starting point."
    elif beside := provenance.training.beside:
        made = f"It was trained beside its target, on the same batches, by {beside}."
    else:
        made = f"It was trained on {_texts(provenance)}."
    how = f"in vLLM, with the method `{METHOD}` of the plugin vllm-mtp"
    if config.unserved:
        how = "of the project vllm-mtp, which vLLM cannot run yet"
    return (
        f"A drafter for speculative decoding of `{target}` {how}. {_reading(config)} "
        f"and keeps none of its own. {_drafting(config)} up to "
        f"{config.num_speculative_tokens} tokens. {made}"
    )


def _reading(config: DrafterConfig) -> str:
    if config.read_layers:
        return "It reads the target's own KV cache"
    if config.uses_boundary_hidden:
        return "It reads a hidden state of the target's, no cache,"
    return "It reads the token before the draft, no cache,"


def _drafting(config: DrafterConfig) -> str:
    if config.chain is not None:
        return "One forward for each drafts"
    return "One forward drafts"


_OWN = "the target's own answers"
_GIVEN = "text that the target did not write (off-policy)"


def _texts(provenance: DrafterProvenance | None) -> str:
    """What a drafter was trained on."""
    every = provenance.every_data if provenance else ()
    kinds = {data.generation.settings.is_off_policy for data in every} or {False}
    return " and on ".join((_OWN, _GIVEN)[kind] for kind in sorted(kinds))


def _use(config: DrafterConfig, target: str, model: str) -> str:
    if why := unserved_text(config):
        folder = _local(model)
        return (
            f"## Use\n\nvLLM does not serve it yet (`{why}`): it is for training, and "
            "for measuring in plain torch, on answers of `vllm-mtp generate` (`pip "
            f"install 'vllm-mtp[train]'`):\n\n```bash\n{_download(model)}"
            f"vllm-mtp eval {folder} --target {shlex.quote(target)} --data ANSWERS\n```"
        )
    k = config.num_speculative_tokens
    # As formatters of Python want it, so that formatting a card changes nothing.
    settings = json.dumps(_settings(model, k), indent=4).replace("\n}", ",\n}")
    python = (
        f"from vllm import LLM\n\nspeculative_config = {settings}\n"
        f"llm = LLM({json.dumps(target)}, speculative_config=speculative_config)"
    )
    where = "" if is_repo_id(target) else f" (`{target}`: the target's folder)"
    if model.startswith("./"):
        where += " (run it beside this folder, or give the folder's whole path)"
    return (
        f"## Use\n\nInstall vllm-mtp beside vLLM (`pip install vllm-mtp`){where}:\n\n"
        f"```bash\n{serve_command(target, model, k)}\n```\n\n"
        f"```python\n{python}\n```"
    )


def _acceptance(
    evaluation: OfflineResult | None, provenance: DrafterProvenance | None
) -> str:
    if evaluation is None:
        return "## Acceptance\n\nNot measured: there is no `evaluation.json`."
    total = evaluation.total
    split = evaluation.settings.get("split")
    of_split = f" (split `{split}`)" if split else ""
    headline = (
        f"With {evaluation.k} drafted tokens per step, over {total.sequences:,} "
        f"answers{of_split} of {total.tokens:,} tokens: acceptance length "
        f"{total.simulated.acceptance_length:.3f} in simulated greedy decoding; "
        f"teacher-forced length {total.teacher_forced_length:.3f}."
    )
    answers = _texts(provenance)
    if evaluation.settings:  # of `eval`, which says whose answers it took
        off = evaluation.settings.get("answers_policy") == "off-policy"
        answers = _GIVEN if off else _OWN
    parts = ["## Acceptance", headline, _MEASURES.format(answers=answers)]
    if temperature := evaluation.settings.get("answers_temperature"):
        parts.append(
            f"The answers were sampled at temperature {temperature}: a draft counts as "
            "accepted only where it is the sampled token."
        )
    return "\n\n".join([*parts, markdown(evaluation)])


def _speed(speed: SpeedRecord | None) -> str:
    if speed is None:
        return ""
    where = [
        ("Device", speed.device),
        ("Versions", speed.versions),
        ("Environment", speed.environment),
        ("Type", f"{speed.dtype}, {'compiled' if speed.compiled else 'eager'}"),
        (
            "Rounds",
            f"{speed.rounds}, the sides in turns"
            + ", new servers in each" * speed.fresh_servers,
        ),
    ]
    if speed.schedule:
        schedule = json.dumps([list(entry) for entry in speed.schedule])
        where.append(("`num_speculative_tokens_per_batch_size`", f"`{schedule}`"))
        tokens = (
            "The number of tokens for each batch size was chosen there, and is this "
            "machine's; run it on yours."
        )
    else:
        tokens = (
            "`num_speculative_tokens` was left out there, so their number was the "
            "method's choice. Another machine gives other figures; run it on yours."
        )
    rows = [
        (
            str(row.requests),
            f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
            f"{row.acceptance_length:.2f}",
            "{:.2f} to {:.2f}".format(*row.control) if row.control else "",
        )
        for row in speed.rows
    ]
    head = ("Requests at once", "Tokens/s, ratio", "Acceptance length", "Control")
    note = (
        "\n\nControl: the ratio of a second server without speculation, lowest to "
        "highest. What lies within says nothing."
    )
    has_control = any(row.control for row in speed.rows)
    width = len(head) if has_control else len(head) - 1
    return (
        "## Speed\n\nTokens per second over those of the target alone, as "
        f"`vllm-mtp bench` measured them: median (lowest to highest). {tokens}"
        f"\n\n{_table(where)}\n\n"
        + table(head[:width], [row[:width] for row in rows])
        + note * has_control
    )


def _design(
    config: DrafterConfig,
    target: str,
    provenance: DrafterProvenance | None,
    speed: SpeedRecord | None,
) -> str:
    cost = draft_cost(config)
    relative = cost.relative_weights
    revision = provenance.target.revision if provenance else None
    fingerprint = config.target.weights_fingerprint
    vocab = config.draft_vocab_size
    markov = config.markov
    inside = set(config.boundary_sources) - {LAST_HIDDEN}
    of_block = config.chain is None and config.input == "block"
    plain_rows = of_block and config.block_mask == "causal" and not config.extra_rows
    rows = [
        ("Target", f"`{target}`" + (f", revision `{revision}`" if revision else "")),
        ("Target's fingerprint", f"`{fingerprint}`" if fingerprint else ""),
        ("Layers", f"`{layers_text(config)}`{_lora_text(config)}"),
        ("Their kinds", _kinds_text(config)),
        (
            "Reads the target's last hidden state",
            "yes" if LAST_HIDDEN in config.boundary_sources else "no",
        ),
        ("Its hidden states that are read", boundary_text(config) if inside else ""),
        ("Tokens per draft", f"1 to {config.num_speculative_tokens}"),
        ("Rows of a draft", "" if plain_rows else rows_text(config)),
        ("LM head", head_text(config) if config.lm_head == "own" else ""),
        ("Placeholders", placeholders_text(config) if config.noise else ""),
        ("Markov correction", f"rank {markov.rank}" if markov else "no"),
        ("Vocabulary", f"{vocab:,} tokens" if vocab else "the target's whole one"),
        ("Weights of its own", f"{cost.drafter_parameters:,} ({config.dtype})"),
        (
            "Weights read per draft",
            f"{cost.draft_parameters:,}, {relative:.2f} of a target step's",
        ),
        ("Time of a draft, measured", steps_text(speed) if speed else ""),
        ("Reads of the prefix", prefix_text(config)),
        (
            "KV cache of its own",
            f"none: {cache_text(config)}",
        ),
        (
            "Cache read per draft",
            f"{cost.kv_bytes_read_per_token:,} bytes per token of prefix that is read"
            if config.readers
            else "",
        ),
        (
            "Cache that the target keeps",
            f"{cost.target_kv_bytes_per_token:,} bytes per token",
        ),
    ]
    return f"## The drafter\n\n{_table(rows)}"


def _kinds_text(config: DrafterConfig) -> str:
    """What the layer list does not say."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(config.layers):
        for holds, what in (
            (getattr(layer, "full_rank", ()), "full rank"),
            (getattr(layer, "form", ""), f"MLP, {getattr(layer, 'form', '')}"),
            (getattr(layer, "attention", "") == "block", "attends to the block alone"),
            (getattr(layer, "per_position", False), "weights for each position"),
        ):
            if holds:
                found.setdefault(what, []).append(index)
    return "; ".join(f"{what}: {numbers}" for what, numbers in found.items())


def _lora_text(config: DrafterConfig) -> str:
    loras = {
        layer.lora
        for layer in config.layers
        if isinstance(layer, SharedLayerConfig) and layer.lora
    }
    texts = sorted(f"rank {lora.rank} on {', '.join(lora.modules)}" for lora in loras)
    return f", LoRA {' and '.join(texts)} for the placeholders" if texts else ""


def _training(provenance: DrafterProvenance | None) -> str:
    if provenance is None or provenance.training is None:
        return ""
    training = provenance.training
    rows = [
        *_data_rows(provenance),
        ("Objective", _objective(training)),
        ("Optimizer steps", f"{training.optimizer_steps:,}"),
        ("Started", utc(training.started)),
        ("Finished", utc(training.finished)),
        ("Time", _time(training)),
        ("Device", training.device),
        ("Warm start", _warm_start(provenance)),
    ]
    taken_by = "co_train" if training.beside else "vllm-mtp train"
    arguments = [
        (f"`{key}`", f"`{json.dumps(value)}`")
        for key, value in training.arguments.items()
    ]
    return (
        f"## Training\n\n{_table(rows)}\n\nSettings, as `{taken_by}` takes them:"
        f"\n\n{_table(arguments)}"
    )


def _adapter(provenance: DrafterProvenance | None) -> str:
    if provenance is None or provenance.adapter is None:
        return ""
    adapter = provenance.adapter
    revision = f", revision `{adapter.revision}`" if adapter.revision else ""
    rows = [
        ("Adapter", f"`{adapter.name}`{revision}"),
        (
            "Base model, as it says",
            f"`{adapter.base_model}`" if adapter.base_model else "",
        ),
        ("Written by peft", adapter.peft_version or ""),
        ("SHA-256 of `adapter_config.json`", f"`{adapter.config_sha256}`"),
    ]
    return f"## The adapter\n\n{_table(rows)}"


def _data_rows(provenance: DrafterProvenance) -> list[tuple[str, str]]:
    return [row for data in provenance.every_data for row in _rows_of_data(data)]


def _rows_of_data(data: DataRecord) -> list[tuple[str, str]]:
    settings = data.generation.settings
    source, sampling = settings.source, settings.sampling
    part = f", part {source.shard} of them" if source.shard else ""
    whose = "the target's own answers to"
    sampled = f"temperature {sampling.temperature}, top_p {sampling.top_p}"
    if settings.is_off_policy:
        whose, sampled = "off-policy: answers that the target did not write, from", ""
    counts = "; ".join(
        f"{split}: {count.rows:,} answers, {count.answer_tokens:,} tokens of answers"
        for split, count in data.generation.splits.items()
    )
    written, writing = "", source.writing
    if writing is not None:
        written = (
            "written by the target itself, sampled with temperature "
            f"{writing.temperature}, top_p {writing.top_p}, up to "
            f"{writing.max_tokens:,} tokens"
        )
    return [
        (
            "Data",
            f"`{data.name}`: {whose} `{source.prompts}`{part}",
        ),
        ("Prompts", written),
        ("Sizes", counts),
        ("Sampling", sampled),
        ("Longest answer", f"{sampling.max_tokens:,} tokens"),
    ]


def _objective(training: TrainingRecord) -> str:
    return " + ".join(
        f"{weight} x {text}"
        for key, text in _TERMS.items()
        if (weight := training.arguments.get(key))
    )


def _time(training: TrainingRecord) -> str:
    hours = f"{training.wall_seconds / 3600:.2f} hours"
    step = training.resumed_from_step
    return f"{hours}, from step {step:,} on" if step else hours


def _warm_start(provenance: DrafterProvenance) -> str:
    parent = provenance.parent
    if parent is None:
        return ""
    return f"`{parent.name}` (config.json: SHA-256 `{parent.config_sha256}`)"


def _check(config: DrafterConfig, target: str, model: str) -> str:
    folder = _local(model)
    what = "See the drafter's layers and costs"
    check = ""
    if not config.unserved:
        what = (
            "Compare what vLLM computes with what training computed, and see the "
            "drafter's layers and costs"
        )
        check = f"vllm-mtp check {folder} --target {shlex.quote(target)}\n"
    return (
        f"## Check it\n\n{what}:\n\n```bash\n{_download(model)}{check}"
        f"vllm-mtp inspect {folder}\n```"
    )


def _local(model: str) -> str:
    """The drafter's folder, beside the shell that the card's commands run in."""
    return shlex.quote("./" + model.rpartition("/")[2])


def _download(model: str) -> str:
    """The command that fetches it, with its line break, if it is on the hub."""
    if model.startswith("./"):
        return ""
    return f"hf download {model} --local-dir {_local(model)}\n"


def _made_with(provenance: DrafterProvenance | None) -> str:
    if provenance is None:
        return ""
    rows = list(provenance.versions.items())
    if git := provenance.git:
        rows.append(("commit of vllm_mtp", git.sha + " (changed)" * git.changed))
    return f"## Made with\n\n{_table(rows)}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns; rows without a value are left out."""
    return table(("", ""), [[plain(cell) for cell in row] for row in rows if row[1]])
