# SPDX-License-Identifier: Apache-2.0
"""The drafters that installed packages offer (``docs/drafter-packages.md``).

A package names each of its drafters in an entry point. Nothing of the package is
imported, so it runs no code here, and a broken one breaks nothing else.
"""

import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from vllm_mtp.errors import CheckpointError, DrafterNotFoundError

GROUP = "vllm_mtp.drafters"


@dataclass(frozen=True)
class InstalledDrafter:
    """A drafter as an entry point names it; nobody has looked at the folder yet.

    Attributes:
        name: The entry point's, or ``DISTRIBUTION:NAME`` where another distribution
            has the same.
        distribution: The installed distribution that offers it.
        place: The folder, written as an importable package: ``package.folder``.
    """

    name: str
    distribution: str
    place: str

    def folder(self) -> Path:
        """Where it is; whether a drafter is in there, reading it tells.

        Raises:
            CheckpointError: The entry point leads nowhere.
        """
        top, *inside = self.place.split(".")
        if not all(map(str.isidentifier, (top, *inside))):
            raise self._broken("expected the folder as a package, such as name.folder")
        folders = [Path(root, *inside).absolute() for root in self._roots(top)]
        if not folders:
            raise self._broken(f"no package {top!r} can be imported")
        # A namespace may be spread over several roots.
        with_config = [f for f in folders if os.path.isfile(f / "config.json")]
        return (with_config or folders)[0]

    def _roots(self, top: str) -> list[str]:
        try:
            # Of a package inside another one, this would import the other one.
            spec = find_spec(top)
        except Exception as error:  # of whoever put a finder of his own there
            raise self._broken(f"{type(error).__name__}: {error}") from None
        return list(spec.submodule_search_locations or []) if spec else []

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"entry point {GROUP}: got {self.place!r}, {reason}; "
            f"install {self.distribution} again, or tell whoever published it"
        )


def installed_drafters() -> list[InstalledDrafter]:
    """All of them, in the order in which a target is offered them: by distribution,
    then by name."""
    found = sorted(
        (_distribution(entry), entry.name, entry.value)
        for entry in entry_points(group=GROUP)
    )
    # Not the first of a name under this name: installing a package must not give a
    # name that somebody uses another meaning.
    times = Counter(name for _, name, _ in found)
    return [
        InstalledDrafter(
            name if times[name] == 1 else f"{distribution}:{name}", distribution, place
        )
        for distribution, name, place in found
    ]


def _distribution(entry: EntryPoint) -> str:
    return (entry.dist and entry.dist.name) or "unknown"


def installed_folder(name: str) -> Path:
    """Folder of the installed drafter of this name.

    Raises:
        DrafterNotFoundError: There is none.
        CheckpointError: Its entry point leads nowhere.
    """
    found = {drafter.name: drafter for drafter in installed_drafters()}
    if name not in found:
        raise DrafterNotFoundError(
            f"got the drafter {name!r}, expected one of an installed package: "
            f"{', '.join(found) or 'there are none'}. Install the package that offers "
            "it; in a checkout: make setup"
        )
    return found[name].folder()
