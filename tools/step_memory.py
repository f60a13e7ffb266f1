# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of a training step of SmolLM2-135M drafters, as JSON lines.

    python -m tools.step_memory [--tokens 2048 --anchors 256 --places 7 --repeats 3]

Memory is what a step allocates above the weights, their gradients and the optimizer,
counted by torch's own tracker (`torch.distributed._tools.mem_tracker.MemTracker`): it
does not depend on the machine. Time is the process's CPU time without the tracker, the
least of some steps. To compare two commits, run it in both by turns.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker

from tools.command import Parser, count
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.data.sharegpt import every_sharegpt_prompt
from vllm_mtp.engine import tokenizer_of
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.objective import Objective

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN = DrafterOptions(
    dtype="float32", bridges=True, boundary_hidden="all", markov_rank=64
)
SHARED = DrafterOptions(dtype="float32", lora_rank=32, lora_modules=SEVEN)
DRAFTERS = {
    "own layers": ("own:10,15,20,25,29", OWN),
    "gated LoRA": ("shared:all", SHARED),
}
OBJECTIVES = {
    "ce": Objective(),
    "ce + tv": Objective(ce=0.1, tv=0.9, position_decay=4.0),
}


def main() -> None:
    """Run from the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {
        "tokens": 2048,
        "anchors": 256,
        "places": 7,
        "repeats": 3,
        "texts": 1,
    }.items():
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--only", default="", help="drafters whose name starts so")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    target = ensure_demo_target()
    host = HFTarget(load_frozen(target, "float32", "cpu"))
    texts = [_text(target, args.tokens, number) for number in range(args.texts)]
    for drafter, (layers, options) in DRAFTERS.items():
        if not drafter.startswith(args.only):
            continue
        for objective, losses in OBJECTIVES.items():
            torch.manual_seed(0)
            model = new_drafter(target, layers, args.places, options)
            with torch.no_grad():  # nothing that is zero, so that all has a gradient
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight), alpha=1e-3)
            plan = LossPlan(objective=losses, anchors_per_text=args.anchors)
            module = LossModule(model, host, plan)
            if args.gradient_checkpointing:
                module.gradient_checkpointing_enable()
            found = {"drafter": drafter, "objective": objective}
            found |= _measured(module, texts, args.repeats)
            print(json.dumps(found), flush=True)


def _text(target: Any, size: int, number: int) -> dict[str, Any]:
    """Real prompts, one behind the other."""
    tokenizer, ids = tokenizer_of(target), []
    for prompt in every_sharegpt_prompt():
        ids += tokenizer.encode(prompt)
        if len(ids) >= size * (number + 1):
            break
    ids = ids[size * number :][:size]
    spans = [[1, size]]
    return {"index": number, "input_ids": torch.tensor(ids), "loss_spans": spans}


class _NoModules(ModTracker):
    """Watches no module: its hooks refuse frozen weights and `autograd.grad`."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that a step holds at a time, above what is there before it."""
    tracker: Any = MemTracker()
    tracker._mod_tracker = _NoModules()
    with tracker:  # counts what begins to exist from here on
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def _measured(module: LossModule, texts: Any, repeats: int) -> dict[str, Any]:
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    times = []
    for _ in range(repeats):
        module.zero_grad(set_to_none=False)
        start = time.process_time()
        loss = module(texts, step=0)["loss"]
        loss.backward()
        times.append(time.process_time() - start)
    norm = torch.stack([w.grad.norm() for w in module.parameters()]).norm()
    del loss
    peak = peak_bytes(lambda: module(texts, step=0)["loss"].backward())
    return {
        "peak_mib": round(peak / 2**20),
        "seconds": round(min(times), 2),
        "loss": round(float(module(texts, step=0)["loss"]), 6),
        "gradient": round(norm.item(), 6),
    }


if __name__ == "__main__":
    main()
