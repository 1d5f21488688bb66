"""Step 10, a store: the checkpoints of one run in one folder, and which of them is the latest."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tiepolicy import TiePlan
from tiepolicy_dcp._digests import Verify
from tiepolicy_dcp._folder import flush_folder, write_text
from tiepolicy_dcp._load import Restored, load
from tiepolicy_dcp._ranks import on_first_rank
from tiepolicy_dcp._save import save
from tiepolicy_dcp.errors import CheckpointError

#: Name that always means the newest whole checkpoint; a file in the root that holds the checkpoint's name.
LATEST = "LATEST"


class CheckpointStore:
    """Checkpoints by name under one root.

    Args:
        root: Folder of the run's checkpoints; made by the first save.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def save(
        self,
        name: str,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        extra: Mapping[str, Any] | None = None,
        plan: TiePlan | None = None,
        consolidated: bool = False,
    ) -> Path:
        """Write a checkpoint as `tiepolicy_dcp.save` does, then point `LATEST` to it in one step.

        Raises:
            CheckpointError: If the name is no plain file name, or as `tiepolicy_dcp.save` says.
        """
        if not name or Path(name).name != name or name.startswith(".") or name == LATEST:
            raise CheckpointError(
                f"{name!r} cannot name a checkpoint: it must be a plain file name other than {LATEST}"
            )
        folder = save(
            self.root / name, model=model, optimizer=optimizer, extra=extra, plan=plan, consolidated=consolidated
        )
        on_first_rank(lambda: self._point_latest(name))
        return folder

    def load(
        self,
        reference: str | Path,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        plan: TiePlan | None = None,
        verify: Verify = "full",
    ) -> Restored:
        """Read what `resolve` finds, as `tiepolicy_dcp.load` does."""
        return load(self.resolve(reference), model=model, optimizer=optimizer, plan=plan, verify=verify)

    def names(self) -> list[str]:
        """The whole checkpoints under the root, sorted by name."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))

    def resolve(self, reference: str | Path) -> Path:
        """The folder of a checkpoint: `LATEST`, a name in this store, or a path.

        Raises:
            CheckpointError: If there is none; the message lists what there is.
        """
        if str(reference) == LATEST:
            return self._latest()
        for folder in (self.root / reference, Path(reference).absolute()):
            if folder.is_dir():
                return folder
        raise CheckpointError(f"there is no checkpoint {str(reference)!r}: {self._inventory()}")

    def _latest(self) -> Path:
        try:
            name = (self.root / LATEST).read_text(encoding="utf-8").strip()
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no checkpoint to restore {LATEST} from: {self._inventory()}") from error
        folder = self.root / name
        if folder.parent != self.root or not folder.is_dir():
            raise CheckpointError(f"{self.root / LATEST} names {name!r}, which is not there: {self._inventory()}")
        return folder

    def _point_latest(self, name: str) -> None:
        temporary = self.root / f".{LATEST}.unfinished"
        write_text(temporary, name + "\n")
        os.replace(temporary, self.root / LATEST)  # noqa: PTH105 - atomic over an existing file on every system
        flush_folder(self.root)

    def _inventory(self) -> str:
        names = self.names()
        return f"{self.root} holds {', '.join(names)}" if names else f"{self.root} holds no checkpoint"
