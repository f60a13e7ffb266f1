# SPDX-License-Identifier: Apache-2.0
"""Real training steps of Qwen3-8B's sizes, traced with tensors without storage.

They take minutes, so what they keep is written down. `test_step_memory.py` holds the
formula against all of it, and runs the cheapest one anew.

python -m tests.training.step_traces            trace them and write step_traces.json
python -m tests.training.step_traces NAME ...   only these
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_mtp.cli.plan import bare_target
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.fake_step import fake_step

FILE = Path(__file__).with_suffix(".json")
TARGET = Path(__file__).parents[2] / "examples" / "train" / "qwen3-8b.config.json"

_OWN: dict[str, Any] = {
    "layers": "own:0,9,18,26,35",
    "num_speculative_tokens": 7,
    "bridges": True,
    "boundary_hidden": "all",
}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ALL = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
_LORA: dict[str, Any] = {"layers": "shared:all", "num_speculative_tokens": 8}
_EXACT_TV: dict[str, Any] = {"ce_weight": 0.1, "tv_weight": 0.9, "teacher_tokens": 0}


def _of(anchors: int, tokens: int, texts: int, **settings: Any) -> dict[str, Any]:
    return {
        "anchors_per_text": anchors,
        "max_text_tokens": tokens,
        "per_device_train_batch_size": texts,
        **settings,
    }


# Looked at while the formula was written. Nothing in it is fitted to their numbers.
SEEN: dict[str, dict[str, Any]] = {
    "own, CE, Markov": _OWN | _of(512, 4096, 1, markov_rank=256),
    "own, exact TV": _OWN | _EXACT_TV | _of(256, 2048, 2),
    "two own layers": _OWN | _of(64, 1024, 4, layers="own:0,35", bridges=False),
    "float32": _OWN | _of(64, 1024, 1, bf16=False),
    "own, layers computed anew": _OWN
    | _EXACT_TV
    | _of(512, 2048, 4, markov_rank=256, gradient_checkpointing=True),
}
# Not looked at before the formula was done.
NEW: dict[str, dict[str, Any]] = {
    "own, four texts": _OWN | _of(512, 4096, 4, markov_rank=256),
    "own, eight texts": _OWN | _EXACT_TV | _of(128, 2048, 8),
    "own, three layers, Muon": _OWN
    | _of(
        *(256, 3072, 3),
        layers="own:0,18,35",
        bridges=False,
        boundary_hidden="first",
        markov_rank=256,
        ce_weight=0.1,
        tv_weight=0.9,
        own_optimizer="muon",
    ),
    "one own layer": _OWN | _of(64, 4096, 8, layers="own:35", loss_vocab_size=32768),
    "own, eight, computed anew": _OWN | _of(256, 4096, 8, gradient_checkpointing=True),
    "mixed, computed anew": _OWN
    | _of(
        *(128, 3072, 3),
        layers="shared:0-3,own:18,35",
        lora_rank=16,
        lora_modules=_ATTENTION,
        markov_rank=64,
        gradient_checkpointing=True,
    ),
    "LoRA, layers computed anew": _LORA
    | _of(
        *(128, 2048, 1),
        lora_rank=128,
        lora_modules=_ALL,
        gradient_checkpointing=True,
    ),
    "mixed": _OWN
    | _of(
        *(256, 2048, 2),
        layers="shared:0-2,own:12,20,27,35",
        markov_rank=32,
        draft_vocab_size=32768,
        ce_weight=0.5,
        kl_weight=0.5,
        teacher_tokens=32,
    ),
    "LoRA, exact TV": _LORA
    | _EXACT_TV
    | _of(128, 4096, 1, lora_rank=128, lora_modules=_ALL),
    "LoRA on noise tokens": _LORA
    | _EXACT_TV
    | _of(
        *(256, 2048, 1),
        placeholder_kind="noise",
        lora_rank=64,
        lora_modules=_ALL,
    ),
    "LoRA, four texts": _LORA
    | _of(64, 1024, 4, lora_rank=32, lora_modules=_ATTENTION, markov_rank=64),
    "LoRA, long blocks": _LORA
    | _of(256, 1024, 2, lora_rank=16, lora_modules=_ALL, num_speculative_tokens=16),
}
SETTINGS = SEEN | NEW


def settings_of(name: str) -> DrafterTrainingArguments:
    """The settings of one of them."""
    return DrafterTrainingArguments(
        **{
            "target": str(TARGET),
            "data": ["none"],
            "output_dir": str(Path(tempfile.gettempdir(), "none")),
            "bf16": True,
            "gradient_checkpointing": False,
            "states_budget_gb": 0,
            "report_to": [],
        }
        | SETTINGS[name]
    )


def main() -> None:
    """Run from the command line."""
    found = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    for name in sys.argv[1:] or SETTINGS:
        trace = fake_step(bare_target(str(TARGET)), settings_of(name))
        found[name] = dict(sorted(trace.peak.items()))
        print(f"{name}: {trace.total / 2**30:.2f} GiB", flush=True)
        kept = {name: found[name] for name in SETTINGS if name in found}
        FILE.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
