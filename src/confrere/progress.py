"""Progress on a terminal: the method, its round, time left, validation score and loss per site."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Notify = Callable[[dict[str, Any]], None]


@contextmanager
def progress(*, quiet: bool) -> Iterator[Notify]:
    """Yield a function that shows each event; without a terminal it prints one line a round."""
    console = Console(quiet=quiet, highlight=False, stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        yield _Show(console, bars)


class _Show:
    def __init__(self, console: Console, bars: Progress) -> None:
        self.console, self.bars = console, bars
        self.method, self.rounds, self.started = "", 0, time.perf_counter()
        self.all_started = self.started
        self.total = self.done = self.begun = 0
        self.tasks: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, "_" + event["event"].replace("-", "_"), None)
        if handler is not None:
            handler(event)

    def _method(self, event: dict[str, Any]) -> None:
        self.method, self.rounds, self.started = event["name"], event["rounds"], time.perf_counter()
        for task in self.tasks.values():
            self.bars.update(task, visible=False)
        self.tasks = {"rounds": self.bars.add_task(f"{self.method}: rounds", total=self.rounds, note="")}

    def _runs(self, event: dict[str, Any]) -> None:
        self.total, self.done, self.all_started = event["total"], event["done"], time.perf_counter()
        self.begun = event["done"]

    def _run(self, event: dict[str, Any]) -> None:
        self.console.print(f"started   {escape(event['name'])}")

    def _run_done(self, event: dict[str, Any]) -> None:
        self.done += 1
        passed = time.perf_counter() - self.all_started
        left = passed / (self.done - self.begun) * (self.total - self.done)
        self.console.print(
            f"[bold]finished[/]  {escape(event['name'])}: {self.done} of {self.total}, about {left / 60:.0f} min left"
        )

    def _tuned(self, event: dict[str, Any]) -> None:
        values = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in event["values"].items())
        begun = "none" if event["untuned"] is None else f"{event['untuned']:.4f}"
        self.console.print(
            f"tuned     {escape(event['data'])}, {escape(event['method'])}: {len(event['trials'])} trials, validation "
            f"criterion {begun} to {event['criterion']:.4f} with {escape(values)}",
            soft_wrap=True,
        )

    def _data(self, event: dict[str, Any]) -> None:
        from confrere.data.check import render_sheet

        self.console.print(render_sheet(event["sheet"]))

    def _prefix(self, event: dict[str, Any]) -> None:
        key = f"prefix {event['site']}"
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(f"{event['site']}: frozen blocks", total=event["total"], note="images")
        self.bars.update(self.tasks[key], completed=event["done"], visible=event["done"] < event["total"])
        if event["done"] == event["total"] and not self.console.is_terminal:
            self.console.print(f"{event['site']}: frozen blocks computed for {event['total']} images")

    def _failure(self, event: dict[str, Any]) -> None:
        who = f"{event['site']} gave no update" if event["site"] else "the server stays as it was"
        self.console.print(f"[yellow]round {event['round']}: {who}:[/] {escape(event['reason'])}")

    def _fallback(self, event: dict[str, Any]) -> None:
        harmed = ", ".join(event["damaged"]) or "states that are gone"
        self.console.print(f"[yellow]damaged: {escape(harmed)}; the rounds after {event['to']} are done again[/]")

    def _round(self, event: dict[str, Any]) -> None:
        self.bars.update(self.tasks["rounds"], completed=event["round"])

    def _evaluation(self, event: dict[str, Any]) -> None:
        scores = "  ".join(f"{s} {v:.2f}" for s, v in event["sites"].items() if v is not None)
        mean = f"mean {event['mean']:.3f}" if event["mean"] is not None else "no scores"
        self.bars.update(self.tasks["rounds"], note=mean)
        seconds = time.perf_counter() - self.started
        self.console.print(
            f"{self.method:<10} round {event['round']:>3}/{self.rounds}  {seconds:5.0f} s  "
            f"validation {mean}  [dim]{scores}[/]",
            soft_wrap=True,
        )

    def _stop(self, event: dict[str, Any]) -> None:
        self.console.print(f"{self.method}: stopped early, {event['reason']}")
