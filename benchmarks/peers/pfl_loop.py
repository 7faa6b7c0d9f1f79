"""The job in pfl-research: SimulatedBackend, FederatedAveraging, one process and one model for all sites.

python pfl_loop.py JOB OUT.json
Adapted: pfl has no notion of LoRA or of a given batch order, so the model wraps PEFT's and a site's data set of a
round is its batches in a row; sites are weighted by training images, as in the other programs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from client import Client, Model, Pictures, first_state, open_job, read, write
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.postprocessor.base import Postprocessor
from torch import Tensor, nn


class Scored(nn.Module):
    """The model with the two methods pfl asks for."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self.model(pixels), labels)

    def metrics(self, pixels: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return nothing that costs a forward pass: scores are computed at the end, as in the other programs."""
        return {"images": Weighted(len(labels), len(labels))}


class ByTrainingImages(Postprocessor):
    """Weights a site by its training images; pfl's own would take the images it drew."""

    def __init__(self, weights: dict[str, int]) -> None:
        self.weights = weights

    def postprocess_one_user(self, *, stats: Any, user_context: Any) -> Any:
        """Scale one site's difference and its weight."""
        stats.reweight(self.weights[user_context.user_id])
        return stats, Metrics()


class WithoutEvaluation(FederatedAveraging):
    """Federated averaging that never asks sites to evaluate: pfl would read every batch three times in round 1."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        """Return the contexts of the next round, training only."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:
            contexts = tuple(replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics


class Clock(TrainingProcessCallback):
    """Notes when rounds end."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """Go on."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    job = open_job(folder)
    names = sorted(job["sites"])
    model = Model(job, folder)
    write(model, first_state(folder))
    model.eval()  # as in the other programs: PEFT's dropout is zero and the backbone frozen
    clients = {name: Client(folder, name, model, job) for name in names}
    asked = dict.fromkeys(names, 0)

    def dataset(name: str) -> PyTorchDataDataset:
        rows = job["sites"][name]["batches"][asked[name]]
        asked[name] += 1
        subset = torch.utils.data.Subset(Pictures(job, name), [row for batch in rows for row in batch])
        return PyTorchDataDataset(subset, user_id=name)

    federation = FederatedDataset(dataset, get_user_sampler("minimize_reuse", names))
    trained = PyTorchModel(
        Scored(model),
        lambda parameters, lr: torch.optim.AdamW(
            [p for p in parameters if p.requires_grad], lr=lr, weight_decay=job["weight_decay"]
        ),
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
    )
    clock = Clock()
    np.random.seed(0)  # pfl asks NumPy for seeds it does not use here
    WithoutEvaluation().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job["rounds"],
            evaluation_frequency=10**6,
            train_cohort_size=len(names),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=federation,
            val_data=federation,
            postprocessors=[ByTrainingImages({name: client.weight for name, client in clients.items()})],
        ),
        model=trained,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=job["lr"],
            local_batch_size=len(job["sites"][names[0]]["batches"][0][0]),
            local_max_grad_norm=job["clip"],
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=64),
        callbacks=[clock],
    )
    state = read(model)
    found = {
        "rounds": [after - before for before, after in pairwise(clock.ends)],
        "val": [clients[name].score(state, 1) for name in names],
        "test": [clients[name].score(state, 2) for name in names],
        "torch": torch.__version__,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
