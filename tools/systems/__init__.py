# SPDX-License-Identifier: Apache-2.0
"""Every published system as a drafter of one target, trained and measured alike.

    python -m tools.systems encode   --target TARGET --data DATA --states STATES
    python -m tools.systems train    --target TARGET --data DATA --out RUNS
    python -m tools.systems evaluate --target TARGET --data DATA --out RUNS
    python -m tools.systems cost     --target TARGET --out RUNS
    python -m tools.systems speed    --target TARGET --out RUNS
    python -m tools.systems report   --out RUNS --data DATA

The settings are in examples/systems. Each command goes on where it was left: what a
run has is not made again. ``--only NAME ...`` takes these systems alone. ``report``
writes docs/systems.md, .json and two plots; without ``--out`` from the JSON alone.
``train`` reads what ``encode`` wrote where it is given the same ``--states``.

A run is a folder of ``--out`` that `vllm-mtp train` wrote. Its name is that of the
settings, or begins with it: ``arm-kv-1`` is another run of arm-kv.

Made for a CPU: one core trains.
"""
