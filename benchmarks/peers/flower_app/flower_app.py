"""The job in Flower's simulation, written as Flower's documentation shows: a model per message, FedAvg over the Grid.

``client.py`` is copied beside this file. Evaluation, as in the other programs, is in the last round only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from client import Client, Model, first_state, open_job
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

site = ClientApp()
server = ServerApp()


def _client(context: Context) -> Client:
    folder = Path(str(context.run_config["job"]))
    job = open_job(folder)
    name = sorted(job["sites"])[int(context.node_config["partition-id"])]
    return Client(folder, name, Model(job, folder), job)


@site.train()
def train(message: Message, context: Context) -> Message:
    """Return the adapters after this round's local steps."""
    client = _client(context)
    state = client.fit(message.content["arrays"].to_torch_state_dict(), int(message.content["config"]["server-round"]))
    metrics = MetricRecord({"num-examples": client.weight})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


@site.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return validation and test scores of the averaged adapters."""
    client = _client(context)
    state = message.content["arrays"].to_torch_state_dict()
    metrics = {"val": client.score(state, 1), "test": client.score(state, 2), "num-examples": 1}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that notes when rounds end and evaluates in the last one only."""

    def __init__(self, rounds: int, **options: Any) -> None:
        super().__init__(**options)
        self.rounds, self.ends, self.scores = rounds, [time.perf_counter()], []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Average as FedAvg does."""
        found = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        return found

    def configure_evaluate(self, server_round: int, *rest: Any) -> Any:
        """Ask nobody before the last round."""
        return super().configure_evaluate(server_round, *rest) if server_round == self.rounds else []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Keep each site's scores."""
        replies = list(replies)
        self.scores = [dict(reply.content["metrics"]) for reply in replies if reply.has_content()]
        return super().aggregate_evaluate(server_round, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write what the other programs write."""
    settings = context.run_config
    rounds, sites = int(settings["rounds"]), int(settings["sites"])
    strategy = TimedFedAvg(
        rounds,
        fraction_train=1.0,
        fraction_evaluate=1.0,
        min_train_nodes=sites,
        min_evaluate_nodes=sites,
        min_available_nodes=sites,
    )
    first = ArrayRecord(first_state(Path(str(settings["job"]))))
    strategy.start(grid=grid, initial_arrays=first, num_rounds=rounds, timeout=3600)
    seconds = [after - before for before, after in pairwise(strategy.ends)]
    found = {
        "rounds": seconds,
        "val": [score["val"] for score in strategy.scores],
        "test": [score["test"] for score in strategy.scores],
        "torch": torch.__version__,
    }
    Path(str(settings["out"])).write_text(json.dumps(found))
