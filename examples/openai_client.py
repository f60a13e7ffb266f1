# SPDX-License-Identifier: Apache-2.0
"""Talk to `vllm serve` with the method `mtp_placeholder`, and read its counters.

Shows: chat, streamed chat and completions with the `openai` client (which sees no
difference to any other vLLM), and the acceptance counters in `/metrics`.

Run:    start a server, here with the demo target, and wait for "startup complete":

            vllm serve "$(vllm-mtp demo-target)" --enforce-eager --max-model-len 1024 \
                --speculative-config '{"method":"mtp_placeholder"}'

        then, beside it:

            python examples/openai_client.py --base-url http://localhost:8000/v1

Expect: three texts, the streamed one equal to the one before it, and an acceptance
        length above 1 for the requests of this run.
"""

import argparse
import sys
import urllib.request

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families

# vLLM's counters, less "vllm:spec_decode_num_" in front and "_total" behind.
DRAFTS, ACCEPTED = "drafts", "accepted_tokens"
PER_POSITION = "accepted_tokens_per_pos"
Counters = dict[tuple[str, int], float]  # (counter, position) -> value

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Name the planets of the solar system."}
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    base_url = parser.parse_args().base_url.rstrip("/")
    metrics_url = base_url.removesuffix("/v1") + "/metrics"

    client = OpenAI(base_url=base_url, api_key="unused")
    model = client.models.list().data[0].id
    before = read_counters(metrics_url)

    whole = chat(client, model)
    print(f"chat:\n{whole}\n")
    print("chat, streamed:")
    streamed = chat_streamed(client, model)
    print("\ncompletion:")
    print("Once upon a time" + complete(client, model, "Once upon a time"), "\n")

    after = read_counters(metrics_url)
    drafts, accepted = (after[c, 0] - before.get((c, 0), 0) for c in (DRAFTS, ACCEPTED))
    print(f"drafts {drafts:.0f}, accepted draft tokens {accepted:.0f}")
    for name, position in sorted(key for key in after if key[0] == PER_POSITION):
        grown = after[name, position] - before.get((name, position), 0)
        print(f"  position {position + 1}: {grown / max(drafts, 1):.3f} accepted")
    length = 1 + accepted / max(drafts, 1)
    print(f"acceptance length {length:.3f}")

    if streamed != whole:
        print("FAILED: the streamed text differs")
    if length <= 1:
        print("FAILED: no draft token was accepted; is the method set on the server?")
    return 0 if streamed == whole and length > 1 else 1


def chat(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=48
    )
    return answer.choices[0].message.content or ""


def chat_streamed(client: OpenAI, model: str) -> str:
    """As `chat`, printing each piece as it comes: up to k + 1 tokens at once."""
    pieces: list[str] = []
    for event in client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=48, stream=True
    ):
        pieces.append(event.choices[0].delta.content or "")
        print(pieces[-1], end="", flush=True)
    print()
    return "".join(pieces)


def complete(client: OpenAI, model: str, prompt: str) -> str:
    answer = client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=48
    )
    return answer.choices[0].text


def read_counters(url: str) -> Counters:
    """The speculative counters of all engines, added up."""
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    counters: Counters = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:spec_decode_num_")
            if name == sample.name or not name.endswith("_total"):
                continue
            key = name.removesuffix("_total"), int(sample.labels.get("position", 0))
            counters[key] = counters.get(key, 0) + sample.value
    return counters


if __name__ == "__main__":
    sys.exit(main())
