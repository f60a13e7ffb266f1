# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a target with TRL, and keep its drafter: `co_train`.

Shows: two lines beside TRL's own SFTTrainer train the drafter on the same batches; vLLM
finds it in the folder that the trainer saved; a running engine takes it by
`replace_drafter`, without a restart.

The target learns to write for a teleprompter: real answers of ShareGPT, in lower case
and in lines of four words. That is far from what its drafter was made for.

Run:    python examples/co_train.py                (needs `pip install trl`)
        python examples/co_train.py --out FOLDER   (keeps what was trained)

Expect: three acceptance lengths on prompts that neither was trained on. The old drafter
        has fewer drafts accepted on the new target than on the old one, and the
        co-trained drafter has more than the old one.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

# Few log lines, unless you set it yourself.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_mtp import co_train, engine, read_vllm_counters
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.data.sharegpt import iter_sharegpt_conversations
from vllm_mtp.data.split import is_held_out, prompt_id
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.installed import installed_drafters

HELD_OUT = 0.04  # the part of all prompts that the shipped drafter was not trained on


def main() -> int:
    arguments = parse_arguments()
    target = arguments.target or ensure_demo_target()
    drafter = arguments.drafter or shipped_drafter()
    k = read_config(drafter).num_speculative_tokens
    pairs = list(islice(questions(held_out=False), arguments.texts))
    asked = [q for q, _ in islice(questions(held_out=True), arguments.prompts)]
    print(f"{len(pairs)} texts, such as:\n\n{on_a_teleprompter(pairs[0][1])[:160]}\n")

    with tempfile.TemporaryDirectory() as scratch:
        new = Path(arguments.out or scratch)
        fine_tune(target, drafter, pairs, new, arguments.texts_per_step)

        with serve(target, drafter, k) as llm:
            report("the old drafter on the old target", acceptance_length(llm, asked))
        with serve(new, drafter, k) as llm:
            before = acceptance_length(llm, asked, show=True)
            report("the old drafter on the new target", before)
            swap = llm.collective_rpc("replace_drafter", args=(str(new / METHOD),))
            assert swap[0]["error"] is None, swap
            after = acceptance_length(llm, asked)
            report("the co-trained drafter on the new target", after)
    if not after > before:
        print("FAILED: the co-trained drafter must have more drafts accepted")
        return 1
    return 0


METHOD = "mtp_placeholder"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep target and drafter here")
    parser.add_argument("--target", type=Path, help="(default: the demo target)")
    parser.add_argument("--drafter", type=Path, help="(default: the shipped `cheap`)")
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--texts-per-step", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    return parser.parse_args()


def shipped_drafter() -> Path:
    return next(d.folder() for d in installed_drafters() if d.name == "cheap")


def questions(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """First questions of ShareGPT with their answers, of one side of the split."""
    for conversation in iter_sharegpt_conversations():
        turns = conversation["conversations"][:2]
        if [turn["from"] for turn in turns] != ["human", "gpt"]:
            continue
        question, answer = (turn["value"].strip() for turn in turns)
        is_plain = answer.isascii() and "```" not in answer
        if not (20 <= len(question) <= 400 and 200 <= len(answer) <= 1500 and is_plain):
            continue
        identifier = prompt_id([{"role": "user", "content": question}])
        if is_held_out(identifier, HELD_OUT) == held_out:
            yield question, answer


def on_a_teleprompter(text: str) -> str:
    """In lower case, in lines of four words."""
    words = text.lower().split()
    return "\n".join(" ".join(words[i : i + 4]) for i in range(0, len(words), 4))


def fine_tune(
    target: Path,
    drafter: Path,
    pairs: list[tuple[str, str]],
    out: Path,
    texts_per_step: int,
) -> None:
    """Train the target with TRL, and its drafter beside it; both end in ``out``."""
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": on_a_teleprompter(answer)}],
        }
        for question, answer in pairs
    ]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(out),
            per_device_train_batch_size=texts_per_step,
            num_train_epochs=1,
            max_length=128,
            learning_rate=3e-4,
            lr_scheduler_type="cosine",
            warmup_steps=4,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=False,
            logging_steps=8,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(target),
    )
    co_train(trainer, drafter, own_optimizer="muon", anchors_per_text=32)
    trainer.train()
    trainer.model.to(torch.bfloat16)  # as it is served
    trainer.save_model()


def serve(target: Path, drafter: Path, k: int) -> Any:
    method = {"method": METHOD, "model": str(drafter), "num_speculative_tokens": k}
    return engine.start(
        target, speculative_config=method, max_model_len=1024, disable_log_stats=False
    )


def acceptance_length(llm: Any, asked: list[str], show: bool = False) -> float:
    """Greedy answers, and vLLM's own counts of the drafts."""
    chats: list[Any] = [[{"role": "user", "content": question}] for question in asked]
    before = read_vllm_counters(llm.get_metrics())
    settings = engine.sampling(temperature=0.0, max_tokens=64)
    answers = llm.chat(chats, settings, use_tqdm=False)
    if show:
        print(f"\nthe new target answers:\n\n{answers[0].outputs[0].text[:160]}\n")
    return (read_vllm_counters(llm.get_metrics()) - before).acceptance_length


def report(name: str, length: float) -> None:
    print(f"{name + ':':<42} acceptance length {length:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
