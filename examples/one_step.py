# SPDX-License-Identifier: Apache-2.0
"""One step of speculative decoding in plain torch: draft, verify, accept.

Shows: the idea, from top to bottom. One request, one layer with random weights, a
paged KV cache; no vLLM, nothing but torch. The target has cached 10 tokens and has just
chosen token 10, the anchor. One forward of the anchor and its placeholders drafts four
tokens from what the target has cached; one forward of the target verifies them.

Run:    python examples/one_step.py

Expect: the shapes, the drafts, how many of them the target accepts, and the token that
        it adds. The first draft is always right: the anchor's row is computed as the
        target computes it. The placeholders are random here, so any other is right by
        luck (with this seed, one is); training is what makes them good. At the end, the
        target decodes the same tokens one by one.
"""

import torch

HIDDEN, HEADS, HEAD_DIM, VOCAB = 32, 2, 16, 50
K = 4  # tokens to draft
BLOCK_SIZE = 4  # tokens per cache block
torch.manual_seed(0)

# The target: embeddings, one attention layer, an LM head. (RoPE is left out here: it
# would be in the cached keys.)
embed, lm_head = torch.randn(VOCAB, HIDDEN), torch.randn(HIDDEN, VOCAB)
wq, wk, wv, wo = torch.randn(4, HIDDEN, HIDDEN) / HIDDEN**0.5
# The drafter is the same layer, and what is trained: a vector for each further token.
placeholders = torch.randn(K - 1, HIDDEN)

# The cache is a pool of blocks that belongs to all requests; ours has four of them.
cache = torch.zeros(2, 16 * BLOCK_SIZE, HEADS, HEAD_DIM)  # keys, values by slot
table = torch.tensor([7, 2, 5, 9])


def slots_of(positions: torch.Tensor) -> torch.Tensor:
    """Where in the pool the keys and values of these positions lie."""
    return table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def forward(rows: torch.Tensor, start: int) -> torch.Tensor:
    """Logits ``[rows, VOCAB]`` of rows at the positions from ``start`` on.

    Each row leaves its key and value in the cache, and reads those of all positions up
    to its own.
    """

    def heads(weight: torch.Tensor) -> torch.Tensor:
        return (rows @ weight).unflatten(-1, (HEADS, HEAD_DIM))

    own = torch.arange(start, start + len(rows))
    cache[0, slots_of(own)], cache[1, slots_of(own)] = heads(wk), heads(wv)
    read = torch.arange(start + len(rows))
    keys, values = cache[:, slots_of(read)]
    scores = torch.einsum("qhd,nhd->hqn", heads(wq), keys) / HEAD_DIM**0.5
    weights = scores.masked_fill(read > own[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("hqn,nhd->qhd", weights, values).flatten(1)
    return (rows + out @ wo) @ lm_head


# 1. Prefix and anchor. The target reads 10 tokens, and chooses the next one.
n = 10
prompt = torch.randint(VOCAB, (n,))
anchor = forward(embed[prompt], 0)[-1:].argmax(-1)
print("prefix        ", list(prompt.shape), "[n], in the blocks", table[:3].tolist())
print("anchor        ", anchor.tolist())

# 2. Draft. The anchor and the placeholders stand behind the prefix, at n .. n+k-1.
# Their keys and values go to these positions' slots, which hold nothing yet: scratch.
block = torch.cat([embed[anchor], placeholders])
scratch = slots_of(torch.arange(n, n + K)).tolist()
drafts = forward(block, n).argmax(-1)  # one forward, k tokens
print("block         ", list(block.shape), "[k, hidden]")
print("scratch slots ", scratch)
print("drafts        ", drafts.tolist())

# 3. Verify. One forward of the target over the anchor and all drafts, from the same
# position on. It writes over the scratch slots, so nothing of the drafter is left.
rows = embed[torch.cat([anchor, drafts])]
logits = forward(rows, n)
choices = logits.argmax(-1)  # what the target says after the anchor, and each draft
print("verified      ", list(rows.shape), "[k + 1, hidden]")
print("logits        ", list(logits.shape), "[k + 1, vocabulary]")
print("overwritten   ", slots_of(torch.arange(n, n + K)).tolist())
print("target says   ", choices.tolist())

# 4. Accept. Drafts count up to the first that the target would not have said; behind
# them comes a token of the target's own, which is the next step's anchor.
accepted = int((drafts == choices[:K]).long().cumprod(0).sum())
bonus = choices[accepted]
answer = [*drafts[:accepted].tolist(), int(bonus)]
print("accepted      ", accepted, "of", K, "and the bonus token", int(bonus))
print("this step     ", answer)

# The target alone says the same, in as many steps as there are tokens.
alone = [anchor]
for position in range(n, n + len(answer)):
    alone.append(forward(embed[alone[-1]], position).argmax(-1))
one_by_one = torch.cat(alone[1:]).tolist()
print("one by one    ", one_by_one)
if one_by_one != answer:
    raise SystemExit("FAILED: the target alone says something else")
