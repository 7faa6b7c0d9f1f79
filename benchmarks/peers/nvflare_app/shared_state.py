"""What NVFlare's server averages: the first adapters and head as a module that names them as the sites do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from client import first_state


class Adapters(nn.Module):
    """A module whose state is the shared state."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.job, self.held = job, first_state(Path(job))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the shared state by its own names, which hold dots."""
        return dict(self.held)

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Take the shared state."""
        self.held = dict(state)
