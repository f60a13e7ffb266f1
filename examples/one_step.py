# SPDX-License-Identifier: Apache-2.0
"""One step of drafting in plain torch: a paged cache, one block, the shapes printed.

Shows: what a draft reads and writes. One request, one attention layer with random
weights, no vLLM. The target has cached the keys and values of 10 tokens and has just
sampled token 10, the anchor. The drafter puts the anchor and its placeholders behind
them, reads what is cached, and drafts k tokens.

Run:    python examples/one_step.py

Expect: the scratch slots of the drafter, and the same slots again at the end, when the
        target's verification overwrites them.
"""

import torch

from vllm_mtp.drafter.layout import CacheTable, DraftInputs, lay_out

HIDDEN, HEADS, HEAD_DIM, VOCAB = 32, 2, 16, 100
K = 4  # num_speculative_tokens
BLOCK_SIZE = 4  # tokens per cache block
torch.manual_seed(0)

embed = torch.randn(VOCAB, HIDDEN)  # the target's, which is also its LM head here
placeholders = torch.randn(K - 1, HIDDEN)  # what is trained
wq, wk, wv, wo = torch.randn(4, HIDDEN, HIDDEN) / HIDDEN**0.5


def heads(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[rows, HIDDEN]`` to ``[rows, HEADS, HEAD_DIM]``."""
    return (rows @ weight).unflatten(-1, (HEADS, HEAD_DIM))


# What the target has done: 10 tokens lie in the cache blocks 7, 2 and 5 of a pool that
# belongs to all requests. (RoPE is left out here: keys carry it in the cache.)
tokens = torch.randint(VOCAB, (11,))
table = torch.tensor([[7, 2, 5, 9]], dtype=torch.int32)  # block 9 is still empty
cache = torch.zeros(2, 16 * BLOCK_SIZE, HEADS, HEAD_DIM)  # keys, values by slot
for n in range(10):
    slot = int(table[0, n // BLOCK_SIZE]) * BLOCK_SIZE + n % BLOCK_SIZE
    row = embed[tokens[n]][None]
    cache[0, slot], cache[1, slot] = heads(row, wk)[0], heads(row, wv)[0]

# 1. Lay out: where the block stands, which slots it may use, what it reads.
layout = lay_out(
    DraftInputs(
        seq_lens=torch.tensor([10]),
        query_ends=torch.tensor([10]),
        num_rejected=None,
        tables=[CacheTable(table, BLOCK_SIZE)],
    ),
    num_draft_tokens=K,
    max_model_len=64,
)
print("positions     ", layout.positions.tolist(), "  [B, k]")
print("scratch slots ", layout.slots[0].tolist(), "  [B * k]")

# 2. The block's rows: the anchor's embedding, then the placeholders.
block = torch.cat([embed[tokens[10]][None], placeholders])
print("block         ", list(block.shape), "         [k, hidden]")

# 3. Its own keys and values go to the scratch slots; then each row reads the prefix and
# the rows before it. Nothing of the prefix is computed again.
slots = layout.slots[0]
cache[0, slots], cache[1, slots] = heads(block, wk), heads(block, wv)
seq_len = int(layout.seq_lens)
read = torch.arange(seq_len)
read = layout.read_tables[0][0, read // BLOCK_SIZE] * BLOCK_SIZE + read % BLOCK_SIZE
keys, values = cache[:, read]
print("keys that are read", list(keys.shape), " [n + k, heads, head_dim]")
scores = torch.einsum("qhd,nhd->hqn", heads(block, wq), keys) / HEAD_DIM**0.5
hidden_from_row = torch.ones(K, seq_len, dtype=torch.bool).triu(seq_len - K + 1)
weights = scores.masked_fill(hidden_from_row, -torch.inf).softmax(-1)
out = torch.einsum("hqn,nhd->qhd", weights, values).flatten(1)
hidden = block + out @ wo

# 4. The target's LM head on every row: k drafts in one forward.
drafts = (hidden @ embed.T).argmax(-1)
print("drafts        ", drafts.tolist(), " [k]")

# 5. The target now verifies [anchor, drafts] from the same position on. It writes its
# own keys and values to the very slots that the drafter used (and the last draft's
# behind them): nothing of the drafter stays.
verified = embed[torch.cat([tokens[10:], drafts[:-1]])]
cache[0, slots], cache[1, slots] = heads(verified, wk), heads(verified, wv)
print("overwritten   ", slots.tolist())
