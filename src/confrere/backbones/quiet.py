"""Keep the libraries' log lines and progress bars from the user while weights are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_LOGGERS = ("transformers", "huggingface_hub", "timm")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, timm and the hub client inside the ``with`` block; everything is put back after.

    What they would have warned about (missing or unexpected weights) is checked by the caller and raised.
    """
    from transformers.utils import logging as transformers_logging

    hub: Any = import_module("huggingface_hub.utils")  # its names are public but not typed as exported
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    hub_bars, bars = not hub.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hub.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if hub_bars:
            hub.enable_progress_bars()
        if bars:
            transformers_logging.enable_progress_bar()
