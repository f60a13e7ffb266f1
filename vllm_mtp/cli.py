# SPDX-License-Identifier: Apache-2.0
"""The command line ``vllm-mtp``.

Every command is one dataclass in ``vllm_mtp/commands/``: its docstring is the
help text, its fields are the flags, its ``run`` does the work.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from vllm_mtp.errors import MTPError

# command: (module, class, one line of help). Spelled out here, so that the
# overview needs no heavy import.
COMMANDS = {
    "demo": ("demo", "Demo", "serve real prompts with and without, and compare"),
    "demo-target": ("demo_target", "DemoTarget", "make the demo target's folder"),
    "init": ("init", "Init", "make a new, untrained drafter for a target"),
    "inspect": ("inspect", "Inspect", "say what a drafter is and what it costs"),
    "doctor": ("doctor", "Doctor", "check whether the method can work here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 fine, 1 failed, 2 wrong usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = _overview().parse_args(arguments[:1]).command, arguments[1:]
    try:
        return _load(name, rest).run()
    except MTPError as error:
        print(f"vllm-mtp {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vllm-mtp {name}: interrupted", file=sys.stderr)
        return 130


def _overview() -> argparse.ArgumentParser:
    lines = [f"  {name:<12} {text}" for name, (_, _, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="vllm-mtp",
        description="Drafters for vLLM that read the target's own KV cache.",
        epilog="commands:\n"
        + "\n".join(lines)
        + "\n\n`vllm-mtp COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("vllm-mtp"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser


def _load(name: str, rest: Sequence[str]):  # type: ignore[no-untyped-def]
    """Parse a command's flags into its dataclass."""
    from transformers import HfArgumentParser

    module, class_name, _ = COMMANDS[name]
    command = getattr(import_module(f"vllm_mtp.commands.{module}"), class_name)
    if hasattr(command, "positional") and rest and not rest[0].startswith("-"):
        # `vllm-mtp inspect FOLDER`: the one flag that every call has.
        rest = [f"--{command.positional}", *rest]
    parser = HfArgumentParser(
        command, prog=f"vllm-mtp {name}", description=command.__doc__
    )
    (parsed,) = parser.parse_args_into_dataclasses(rest)
    return parsed


if __name__ == "__main__":
    sys.exit(main())
