# SPDX-License-Identifier: Apache-2.0
"""The command line ``vllm-mtp``.

Every command is one dataclass in ``vllm_mtp/cli/``: its docstring is the
help text, its fields are the flags, its ``run`` does the work.
"""

import argparse
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from vllm_mtp import interrupts, processes
from vllm_mtp.errors import MTPError

# command: (module, class, one line of help). Spelled out here, so that the
# overview needs no heavy import.
COMMANDS = {
    "demo": ("demo", "Demo", "serve real prompts with and without, and compare"),
    "demo-target": ("demo_target", "DemoTarget", "make the demo target's folder"),
    "init": ("init", "Init", "make a new, untrained drafter for a target"),
    "generate": ("generate", "Generate", "let a target answer prompts, as a dataset"),
    "plan": ("plan", "PlanCommand", "say what a training run takes, without a GPU"),
    "train": ("train", "Train", "train a drafter on the target's own answers"),
    "eval": ("eval", "Eval", "measure how many drafts a target would accept"),
    "bench": ("bench", "Bench", "measure tokens/s beside stock vLLM"),
    "inspect": ("inspect", "Inspect", "say what a drafter is and what it costs"),
    "check": ("check", "Check", "compare a served drafter with the trained one"),
    "import": ("import_adapter", "ImportAdapter", "make a drafter of a PEFT adapter"),
    "export": ("export_adapter", "ExportAdapter", "write a drafter as a PEFT adapter"),
    "push": ("push", "Push", "upload a drafter to the Hugging Face hub"),
    "references": ("references", "References", "list the drafters that are installed"),
    "doctor": ("doctor", "Doctor", "check whether the method can work here"),
}

# What the extra `train` installs, as it is imported.
TRAIN_PACKAGES = ("accelerate", "datasets", "tensorboard", "yaml")
_YAML = (".yaml", ".yml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 fine, 1 failed, 2 wrong usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    interrupts.advise("")
    if argv is None:  # the process is the command's alone
        interrupts.take_over("".join(arguments[:1]))
    name, rest = _overview().parse_args(arguments[:1]).command, arguments[1:]
    return interrupts.finish(_run(name, rest))


def _run(name: str, rest: Sequence[str]) -> int:
    try:
        _require_text(rest)
        with interrupts.one_exception():
            with _heard_once():
                command = _load(name, rest)
            code: int = command.run()
        return code
    except KeyboardInterrupt:
        if processes.is_first():
            print(interrupts.last_line(name), file=sys.stderr)
        return interrupts.EXIT_CODE
    except Exception as error:
        said = _said(error)
        if said is not None:
            said = _with_its_flag(said, name, rest)
        if processes.is_first_to_fail():
            if said is None:
                raise
            print(f"vllm-mtp {name}: {said}", file=sys.stderr)
        return 1


@contextmanager
def _heard_once() -> Iterator[None]:
    """Every process has the same flags, and argparse would say the same in each."""
    if processes.count() == 1:
        yield
        return
    said = io.StringIO()
    speaks = processes.is_first()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except SystemExit:
        # The launcher ends the others as soon as it sees one end.
        speaks = processes.is_first_to_fail()
        raise
    finally:
        if speaks:
            sys.stderr.write(said.getvalue())


# Keys of a drafter's config whose flags have other names.
_FLAGS = {
    "attention": "own_attention",
    "bridge": "bridges",
    "form": "mlp_form",
    "full_rank": "full_rank_modules",
    "markov": "markov_rank",
    "noise": "placeholder_kind",
}


def _with_its_flag(said: str, name: str, rest: Sequence[str]) -> str:
    """A line about a setting, ``key: got ...``, as the user wrote that: where a YAML
    file was given and no such flag, its key stays."""
    from dataclasses import fields

    match = re.match(r"(?:layers\.\d+\.)?(\w+)(?:\.\d+)?: ", said)
    module, class_name, _ = COMMANDS[name]
    if match is None:
        return said
    command = getattr(import_module(f"vllm_mtp.cli.{module}"), class_name)
    key = _FLAGS.get(match[1], match[1])
    if key not in {field.name for field in fields(command)}:
        return said
    flag = "--" + key.replace("_", "-")
    given = {word.partition("=")[0].replace("_", "-") for word in rest}
    if rest and rest[0].endswith(_YAML) and flag not in given:
        return said
    return f"{flag}: {said[match.end() :]}"


def _said(error: Exception) -> str | None:
    """The line for what a user can do something about."""
    if isinstance(error, MTPError):
        return str(error)
    if isinstance(error, ImportError) and (package := _missing_package(error)):
        return f"needs the package {package}: pip install 'vllm-mtp[train]' ({error})"
    if processes.lost_another(error):
        said = " ".join(str(error).split())[:200]
        return (
            f"another process of the run has ended, or cannot be reached ({said}); the "
            "launcher says which one, and its exit code"
        )
    return None


def _require_text(arguments: Sequence[str]) -> None:
    """Names of files end up in records, which are UTF-8."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise MTPError(
                f"argument {ascii(argument)}: not UTF-8, so no record could hold it; "
                "rename the file or folder"
            ) from None


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


def _missing_package(error: ImportError) -> str | None:
    """The package of the extra `train` that could not be imported."""
    # transformers names accelerate in its message alone.
    said = error.name.partition(".")[0] if error.name else str(error)
    named = re.findall(r"\w+", said)
    return next((package for package in TRAIN_PACKAGES if package in named), None)


def _load(name: str, rest: Sequence[str]):  # type: ignore[no-untyped-def]
    """Parse a command's flags into its dataclass."""
    from transformers import HfArgumentParser

    module, class_name, _ = COMMANDS[name]
    command = getattr(import_module(f"vllm_mtp.cli.{module}"), class_name)
    parser = HfArgumentParser(
        command,
        prog=f"vllm-mtp {name}",
        usage=getattr(command, "usage", None),
        description=command.__doc__,
        allow_abbrev=False,  # what is short for one flag today may be for two tomorrow
    )
    flags = _flags(command, rest, parser)
    # Exits on an unknown flag. First, since the dataclass would complain about what
    # the misspelt flag was to set.
    parser.parse_args(flags)
    (parsed,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    return parsed


def _flags(
    command: type, rest: Sequence[str], parser: argparse.ArgumentParser
) -> list[str]:
    """What stands before the flags, as flags too."""
    from dataclasses import fields

    from vllm_mtp.cli.yaml_flags import flags_of_yaml

    first, *others = rest or [""]
    if hasattr(command, "positional") and first and not first.startswith("-"):
        # `vllm-mtp inspect FOLDER`: the one flag that every call has.
        return [f"--{command.positional}", *rest]
    if not hasattr(command, "takes_yaml"):
        return list(rest)
    # Behind a flag that takes a list, argparse would take it for a part of that.
    if late := [a for a in others if a.endswith(_YAML) and not a.startswith("-")]:
        parser.error(
            f"{late[0]}: expected one YAML file at most, and that as the first "
            f"argument: {parser.prog} {late[0]} --flags ..."
        )
    if first.endswith(_YAML):
        return [*flags_of_yaml(Path(first), fields(command)), *others]
    return list(rest)


if __name__ == "__main__":
    sys.exit(main())
