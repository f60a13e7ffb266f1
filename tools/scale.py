# SPDX-License-Identifier: Apache-2.0
"""What the recipes for an 8B target take, by `vllm-mtp plan`, as a table of
docs/scale.md."""

from pathlib import Path
from typing import NamedTuple

from vllm_mtp.cli.main import _load
from vllm_mtp.cli.plan import PlanCommand, bare_target
from vllm_mtp.markdown import plain, table
from vllm_mtp.training.plan import GIB, Plan, Texts, make_plan
from vllm_mtp.training.step_time import Device

EXAMPLES = Path(__file__).parents[1] / "examples" / "train"
TARGET = EXAMPLES / "qwen3-8b.config.json"
RECIPES = ("qwen3-8b-own-layers", "qwen3-8b-uno")
TEXTS = Texts(100_000, 256, 768)


class Machine(NamedTuple):
    """Devices, with what their makers say of them."""

    name: str
    number: int
    tflops: float  # of dense products in bfloat16, summed in float32
    bandwidth: float
    memory: float  # GiB


# NVIDIA's Ada whitepaper and H100 data sheet.
MACHINES = (
    Machine("1 x 24 GB (RTX 4090)", 1, 165.2, 1008, 24),
    Machine("1 x 80 GB (H100 SXM)", 1, 989, 3350, 80),
    Machine("8 x 80 GB (H100 SXM)", 8, 989, 3350, 80),
)


def settings_of(recipe: str, machine: Machine) -> PlanCommand:
    """A recipe's settings, with as many texts per optimizer step on any machine."""
    args: PlanCommand = _load(
        "plan", [str(EXAMPLES / f"{recipe}.yaml"), "--target", str(TARGET)]
    )
    args.gradient_accumulation_steps //= machine.number
    return args


def planned(recipe: str, machine: Machine) -> tuple[Plan, Plan]:
    """The plan of a recipe on a machine, and that of what fits there."""
    target = bare_target(str(TARGET))
    device = Device(machine.tflops, 0.3, machine.bandwidth, machine.memory * GIB)
    args = settings_of(recipe, machine)
    plan = make_plan(target, args, device, machine.number, TEXTS, 256)
    if plan.fits:
        return plan, plan
    changed = make_plan(target, plan.changed, device, machine.number, TEXTS, 256)
    return plan, changed


def scale_table() -> str:
    """One row per recipe and machine."""
    head = (
        "Recipe", "Devices", "Peak", "Free", "Changed to fit", "Peak then",
        "Answers", "One epoch",
    )  # fmt: skip
    rows = []
    for recipe in RECIPES:
        for machine in MACHINES:
            plan, fitting = planned(recipe, machine)
            epochs = plan.shape.args.num_train_epochs
            rows.append(
                (
                    f"`{recipe}.yaml`",
                    machine.name,
                    f"{plan.peak / GIB:.1f}",
                    f"{plan.capacity / GIB:.0f}",
                    _changes(plan),
                    f"{fitting.peak / GIB:.1f}",
                    f"{fitting.generation_hours:.1f} h",
                    f"{fitting.hours / epochs:.1f} h",
                )
            )
    return table(head, [tuple(map(plain, row)) for row in rows])


def _changes(plan: Plan) -> str:
    last: dict[str, object] = {}
    for change in plan.changes:
        last |= {name: after for name, (_, after) in change.settings.items()}
    return ", ".join(f"`{name}: {value}`" for name, value in last.items()) or "nothing"
