# SPDX-License-Identifier: Apache-2.0
"""What a draft reads, counted by hand for each kind of drafter."""

import json
from typing import Any

import pytest

from tests.drafter.test_config import VALID
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.cost import DraftCost, draft_cost

HIDDEN, VOCAB, K, MLP = 16, 32, 4, 24
QUERIES, KEYS = 16, 8  # 2 heads and 1 KV head of 8
OWN = {"kind": "own", "target_layer": 1, "intermediate_size": 24, "rms_norm_eps": 1e-5}
SHARED = {"kind": "shared", "target_layer": 0}
# Linear maps of an own layer, or of one of the target's; and its two norms.
LINEAR = HIDDEN * (2 * QUERIES + 2 * KEYS) + 3 * HIDDEN * MLP
LAYER = LINEAR + 2 * HIDDEN
HEAD = VOCAB * HIDDEN
CACHE = 2 * KEYS * 2  # bytes of a layer and token
PLACEHOLDERS = (K - 1) * HIDDEN


def cost_of(*layers: dict[str, Any], **keys: Any) -> DraftCost:
    plain = {
        key: VALID[key] for key in ("model_type", "format_version", "dtype", "target")
    }
    config = plain | {"num_speculative_tokens": K, "layers": list(layers)} | keys
    return draft_cost(DrafterConfig.model_validate_json(json.dumps(config)))


@pytest.mark.parametrize(
    ("cost", "own", "reads", "cache"),
    [
        (cost_of(OWN), LAYER + PLACEHOLDERS, LAYER + PLACEHOLDERS + HEAD, CACHE),
        # Every position's weights are read, once.
        (
            cost_of(OWN | {"per_position": True, "attention": "block"}),
            K * LINEAR + 2 * HIDDEN + PLACEHOLDERS,
            K * LINEAR + 2 * HIDDEN + PLACEHOLDERS + HEAD,
            0,
        ),
        # Heads of its own: the target's is not read.
        (
            cost_of({"kind": "mlp", "form": "square"}, input="boundary", lm_head="own"),
            HIDDEN * HIDDEN + HIDDEN + K * HEAD,
            HIDDEN * HIDDEN + HIDDEN + K * HEAD,
            0,
        ),
        # Of a chain all is read for each position, but for what is one position's.
        (
            cost_of(
                SHARED,
                OWN,
                {"kind": "mlp", "form": "square", "per_position": True},
                chain={"rms_norm_eps": 1e-5},
            ),
            2 * HIDDEN**2 + 2 * HIDDEN + LAYER + K * (HIDDEN**2 + HIDDEN),
            K * (2 * HIDDEN**2 + 2 * HIDDEN + 2 * LAYER + HEAD)
            + K * (HIDDEN**2 + HIDDEN),
            K * 2 * CACHE,
        ),
        (
            cost_of(SHARED | {"full_rank": ["up_proj"]}, extra_rows=2),
            HIDDEN * MLP + 2 * HIDDEN + PLACEHOLDERS,
            HIDDEN * MLP + 2 * HIDDEN + PLACEHOLDERS + LAYER + HEAD,
            CACHE,
        ),
    ],
    ids=["own", "per position", "heads", "chain", "full rank"],
)
def test_what_a_draft_reads(cost: DraftCost, own: int, reads: int, cache: int) -> None:
    assert cost.drafter_parameters == own
    assert cost.draft_parameters == reads
    assert cost.kv_bytes_read_per_token == cache
    assert cost.target_parameters == 4 * LAYER + HEAD
    assert cost.relative_weights == pytest.approx(reads / (4 * LAYER + HEAD))
