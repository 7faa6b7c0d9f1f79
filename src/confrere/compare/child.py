"""A training in a process of its own that ends when the comparison that started it is gone.

``python -m confrere.compare.child PARENT VERB ...`` does what ``confrere VERB ...`` does, for the process PARENT.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

EVERY = 0.5


def end_with(parent: int, every: float = EVERY) -> None:
    """End this process as Ctrl-C would, once ``parent`` is no longer its parent: it was killed and cannot say so.

    Args:
        parent: a process id. It must have started this process itself.
        every: seconds between two looks.

    Systems where a child keeps its parent's id (Windows) do not tell; there a training goes on to its end.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    runpy.run_module("confrere", run_name="__main__", alter_sys=True)
