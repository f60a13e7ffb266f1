# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps in memory, counted off the code.

Each term is a tensor that lives at that moment in what `LossModule` and the layers do;
`vllm_mtp.training.fake_step` runs them, and a test holds the two beside each other. The
largest moment is one of: the target's forward over the last text, the loss, the
backward through a part of a layer (the parts behind it have gradients already, those
before it still have their activations), or the optimizer's step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LayerConfig,
    LinearName,
    MLPLayerConfig,
    OwnLayerConfig,
    SharedLayerConfig,
)
from vllm_mtp.drafter.cost import markov_weights
from vllm_mtp.drafter.lora import linear_sizes
from vllm_mtp.torch_host.block_attention import GPU_SCORES
from vllm_mtp.training.step_shape import StepShape
from vllm_mtp.training.token_loss import GPU_LOGITS

TARGET, DRAFTER, OPTIMIZER = "target's weights", "drafter's weights", "optimizer"
GRADIENTS, STATES = "gradients", "target's states"
ACTIVATIONS, ATTENTION = "activations of the layers", "attention"
LOSS, BUCKETS = "logits and loss", "gradients between devices"
KEPT = "states that are kept"
AVERAGE = "average of the weights"

_WIDE = 4  # bytes of float32
# Of a score, where a slice of attention is largest: masked, with the block's own, in
# float32, and after softmax; the backward has as many bytes.
_PER_SCORE = 12


def uncounted(config: DrafterConfig) -> list[str]:
    """Keys of a drafter's config for which there is no formula, here or in
    `step_time`."""
    whole = ("chain", "input", "lm_head", "extra_rows", "boundary_layers")
    found = list(config.changed(*whole))
    for index, layer in enumerate(config.layers):
        if isinstance(layer, MLPLayerConfig):
            keys = ["kind"]
        elif isinstance(layer, OwnLayerConfig):
            keys = list(layer.changed("per_position", "attention", "boundary_of"))
        else:
            keys = list(layer.changed("full_rank"))
        found += [f"layers.{index}.{key}" for key in keys]
    return found


@dataclass(frozen=True)
class _Part:
    """Attention or MLP of a draft layer, with what stands in front of it.

    Attributes:
        saved: Bytes that its forward keeps for its backward.
        copies: Bytes of its weights in the type of the products, kept likewise.
        parameters: Its trained weights.
        scores: Bytes that a slice of its attention takes.
        backward: Bytes that the rest of its backward takes besides.
    """

    saved: int
    copies: int
    parameters: int
    scores: int
    backward: int


def step_memory(shape: StepShape, num_devices: int = 1) -> dict[str, int]:
    """Bytes by item, at the moment when there are most.

    Args:
        shape: The step's sizes.
        num_devices: Of several, each keeps gradients once more, to be summed.
    """
    always = {
        TARGET: shape.target.bytes,
        DRAFTER: _WIDE * shape.drafter_parameters,
        OPTIMIZER: shape.optimizer_bytes,
    }
    if shape.args.states_budget_gb:  # by default a GPU keeps none
        always[KEPT] = round(shape.args.states_budget_gb * 2**30)
    if shape.args.ema_decay is not None:
        always[AVERAGE] = always[DRAFTER]
    if num_devices > 1:
        always[BUCKETS] = _WIDE * shape.trained_parameters
    most = max(_moments(shape), key=lambda moment: sum(moment.values()))
    return {name: always.get(name, 0) + most.get(name, 0) for name in (*always, *most)}


def _moments(shape: StepShape) -> Iterator[Mapping[str, int]]:
    """What lives besides the weights at each moment that may be the largest."""
    layers = [
        _own_parts(shape, layer)
        if isinstance(layer, OwnLayerConfig)
        else _shared_parts(shape, layer)
        for layer in shape.config.layers
    ]
    trains = shape.args.train_only == "all"
    states, around = shape.texts * _states_bytes(shape), _around(shape)
    yield {STATES: states + _encoding_bytes(shape)}
    copies = sum(part.copies for parts in layers for part in parts)
    before = [around + kept for kept in _kept_before(shape, layers)]
    forward = {STATES: states, ACTIVATIONS: before[-1] + copies}
    if shape.args.unvisited_weight < 1:
        yield forward | {LOSS: _pick_bytes(shape)}
    yield forward | {LOSS: _loss_bytes(shape)}
    behind = _WIDE * _markov_parameters(shape) if trains else 0
    # Gradients of the loss are multiplied by what comes from behind: two of each.
    yield forward | {GRADIENTS: 2 * behind, LOSS: 2 * _rows_bytes(shape)}
    again = shape.args.gradient_checkpointing
    for index in reversed(range(len(layers))):
        parts = layers[index]
        copies -= sum(part.copies for part in parts)
        kept = before[index] + (0 if again else copies)
        for number in reversed(range(len(parts))):
            part = parts[number]
            own = sum(p.saved + p.copies for p in parts[: number + 1])
            yield {
                GRADIENTS: behind,
                ACTIVATIONS: kept + own,
                ATTENTION: part.scores,
            }
            now = kept + own + part.backward
            yield {GRADIENTS: behind, ACTIVATIONS: now}
            # Its gradients come as what they are made of goes.
            behind += _WIDE * part.parameters if trains else 0
            yield {GRADIENTS: behind, ACTIVATIONS: now - part.saved}
    gradients = _WIDE * shape.trained_parameters
    optim = str(getattr(shape.args.optim, "value", shape.args.optim))
    # One that is not fused makes the steps of all weights before it takes them.
    yield {GRADIENTS: gradients, OPTIMIZER: 0 if "fused" in optim else gradients}


def _kept_before(
    shape: StepShape, layers: Sequence[tuple[_Part, _Part]]
) -> Iterator[int]:
    """Bytes that are kept of the layers before each, and in the end those of all: what
    their backward needs, or their inputs alone where that is computed anew."""
    stream = _rows(shape) * shape.config.target.hidden_size * _stream_item(shape)
    total = 0
    yield total
    for parts, layer in zip(layers, shape.config.layers, strict=True):
        if not shape.args.gradient_checkpointing:
            total += sum(part.saved for part in parts)
        else:
            # An own layer hands on what it gives and what that is added to.
            total += stream * (2 if isinstance(layer, OwnLayerConfig) else 1)
        yield total


def _own_parts(shape: StepShape, layer: OwnLayerConfig) -> tuple[_Part, _Part]:
    facts = shape.config.target.of_layer(layer.target_layer)
    hidden, mlp, item = facts.hidden_size, layer.intermediate_size, shape.item
    query = facts.num_attention_heads * facts.head_dim
    key = facts.num_key_value_heads * facts.head_dim
    norms = 2 if layer.norm_placement == "around" else 1
    # In float32 and, before its weight, in the type of the products.
    norm = norms * hidden * (_WIDE + item)
    wide = _WIDE if layer.qk_norm else item
    attention = (
        (hidden * item if layer.bridge else 0)
        + norm
        + _inputs(shape, hidden, 3 + layer.output_gate)
        + (query + key) * (layer.qk_norm * (_WIDE + item) + wide)
        + key * item
        + query * item * (1 + 3 * layer.output_gate)
        + 2 * facts.head_dim * _WIDE
    )
    feed_forward = norm + _inputs(shape, hidden, 2) + 4 * mlp * item
    rows, squares = _rows(shape), hidden * hidden
    of_attention = (
        2 * hidden * (query + key)
        + layer.output_gate * hidden * query
        + squares * layer.bridge
    )
    of_boundary = squares * layer.boundary_hidden
    of_mlp = 3 * hidden * mlp
    copies = item if shape.args.bf16 else 0
    return (
        _Part(
            saved=rows * attention,
            copies=copies * of_attention,
            parameters=of_attention + of_boundary,
            scores=_scores_bytes(shape, layer.target_layer, wide),
            backward=rows * 3 * query * wide + copies * squares,
        ),
        _Part(
            saved=rows * feed_forward,
            copies=copies * of_mlp,
            parameters=of_mlp,
            scores=0,
            backward=rows * (2 * mlp + hidden) * item + copies * hidden * mlp,
        ),
    )


def _shared_parts(shape: StepShape, layer: LayerConfig) -> tuple[_Part, _Part]:
    assert isinstance(layer, SharedLayerConfig), "others are refused before"
    facts = shape.config.target.of_layer(layer.target_layer)
    hidden, item, stream = facts.hidden_size, shape.item, _stream_item(shape)
    mlp = facts.intermediate_size or shape.target.active_mlp
    query = facts.num_attention_heads * facts.head_dim
    key = facts.num_key_value_heads * facts.head_dim
    names: tuple[LinearName, ...] = layer.lora.modules if layer.lora else ()
    rank = layer.lora.rank if layer.lora else 0
    norms = hidden * _WIDE
    qk_norm = shape.target.qk_norm

    def pairs(*wanted: LinearName) -> tuple[int, int]:
        """Weights, and numbers of a row between the two matrices."""
        found = [name for name in wanted if name in names]
        return (
            sum(rank * sum(linear_sizes(facts, name)) for name in found),
            len(found) * rank,
        )

    def inputs(*wanted: LinearName) -> int:
        number = len(set(wanted) & set(names))
        # What the frozen norm gives needs no copy if it has the type of the products.
        return _inputs(shape, hidden, number if stream > item else min(number, 1))

    attention_pairs, attention_narrow = pairs("q_proj", "k_proj", "v_proj", "o_proj")
    mlp_pairs, mlp_narrow = pairs("gate_proj", "up_proj", "down_proj")
    attention = (
        norms
        + inputs("q_proj", "k_proj", "v_proj")
        + (query + key) * (qk_norm * _WIDE + stream)
        + key * item
        + ("o_proj" in names) * query * item
        + attention_narrow * item
        + 2 * facts.head_dim * stream
    )
    feed_forward = (
        norms
        + inputs("gate_proj", "up_proj")
        + (3 + ("down_proj" in names)) * mlp * item
        + mlp_narrow * item
    )
    rows, copies = _rows(shape), item if shape.args.bf16 else 0
    return (
        _Part(
            saved=rows * attention,
            copies=copies * attention_pairs,
            parameters=attention_pairs,
            scores=_scores_bytes(shape, layer.target_layer, stream),
            backward=rows * 3 * query * stream,
        ),
        _Part(
            saved=rows * feed_forward,
            copies=copies * mlp_pairs,
            parameters=mlp_pairs,
            scores=0,
            backward=rows * (2 * mlp * item + hidden * stream),
        ),
    )


def _inputs(shape: StepShape, hidden: int, number: int) -> int:
    """Bytes of a row that products with as many trained matrices keep: autocast makes a
    copy for each, of what is one tensor in float32."""
    if not number:
        return 0
    return hidden * (number * shape.item if shape.args.bf16 else _WIDE)


def _rows(shape: StepShape) -> int:
    return shape.texts * shape.blocks * shape.positions


def _stream_item(shape: StepShape) -> int:
    """Bytes of a number of the stream: trained placeholders are in float32, and become
    what the anchors beside them are."""
    trained = shape.config.noise is None
    return _WIDE if shape.is_exact and trained else shape.item


def _rows_bytes(shape: StepShape) -> int:
    """Of the rows that are scored, of all texts."""
    taught = shape.positions + shape.is_exact
    rows = shape.texts * shape.blocks * taught
    return rows * shape.config.target.hidden_size * _stream_item(shape)


def _scores_bytes(shape: StepShape, target_layer: int, item: int) -> int:
    """Of the largest slice of attention, and what it leaves for all rows: gradients of
    queries, keys and values, each slice's in the size of all, and their sum."""
    facts = shape.config.target.of_layer(target_layer)
    heads = facts.num_attention_heads
    of_text = shape.blocks * shape.positions * heads * shape.tokens
    queries = heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    of_rows = shape.blocks * shape.positions * (queries * item * 2 + keys * item * 4)
    prefix = 2 * shape.tokens * keys * (item + shape.item)
    return _PER_SCORE * min(of_text, GPU_SCORES) + of_rows + prefix


def _loss_bytes(shape: StepShape) -> int:
    """Of a slice of the loss, and of the gradients that slices add to."""
    facts, taught = shape.config.target, shape.positions + shape.is_exact
    at_once = max(GPU_LOGITS // (shape.scored * taught), 1)
    logits = min(at_once, shape.blocks) * shape.positions * shape.scored
    # Of each logit: the logarithm of its probability, that one's gradient, and its own.
    each = 3 * _WIDE
    if shape.needs_teacher and not shape.args.teacher_tokens:
        # The target's probability, and what makes a distance of the two, of which one
        # is in the type of the products.
        each += 2 * _WIDE + 2
    head = 0
    if shape.scored < facts.vocab_size:
        head = shape.scored * facts.hidden_size * shape.item
    markov = 0
    if shape.config.markov:
        unembed = shape.scored * shape.config.markov.rank
        copies = shape.item if shape.args.bf16 else 0
        markov = 2 * _WIDE * _markov_parameters(shape) + copies * unembed
    return each * logits + head + markov + _rows_bytes(shape)


def _pick_bytes(shape: StepShape) -> int:
    """Of a slice of the blocks whose drafts are chosen: all logits, and those of one
    position beside them with the Markov correction added."""
    taught, tokens = shape.positions + shape.is_exact, shape.config.num_draftable_tokens
    at_once = max(GPU_LOGITS // (tokens * taught), 1)
    blocks = min(at_once, shape.texts * shape.blocks)
    beside = 2 if shape.config.markov else 0
    return (taught + beside) * blocks * tokens * shape.item


def _markov_parameters(shape: StepShape) -> int:
    markov, facts = shape.config.markov, shape.config.target
    if markov is None:
        return 0
    out = shape.config.num_draftable_tokens
    return sum(markov_weights(markov.rank, facts.hidden_size, facts.vocab_size, out))


def _states_bytes(shape: StepShape) -> int:
    """Of a text: keys and values of the layers that are read, and the last hidden
    state."""
    facts = shape.config.target
    keys = sum(
        2 * heads.num_key_value_heads * heads.head_dim
        for heads in map(facts.of_layer, shape.config.bound_layers)
    )
    return shape.tokens * (keys + facts.hidden_size) * shape.item


def _encoding_bytes(shape: StepShape) -> int:
    """Of the target's forward over a text: the whole cache, and a layer's MLP."""
    facts = shape.config.target
    mlp = facts.intermediate_size or shape.target.active_mlp
    widths = shape.target.kv_heads + 3 * mlp + 4 * facts.hidden_size
    return shape.tokens * widths * shape.item


def _around(shape: StepShape) -> int:
    """Of what stands before and behind the layers: the embedded rows, the boundary
    hidden state of each, and the final norm."""
    hidden, stream = shape.config.target.hidden_size, _stream_item(shape)
    per_row = hidden * (2 * stream + _WIDE)
    if shape.config.uses_boundary_hidden:
        per_row += hidden * shape.item
    whole = _rows_bytes(shape) if shape.is_exact else 0
    return _rows(shape) * per_row + whole
