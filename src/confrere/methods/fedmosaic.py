"""FedMosaic: sites share small matrices between fixed factors, the more the more alike their tasks are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from confrere.adapters import colora
from confrere.adapters.names import slot_of
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, one_of, register
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, pick


@register(
    "fedmosaic",
    title="Shared inner matrices, by relevance (FedMosaic, Co-LoRA)",
    paper="Seo et al., Not All Clients Are Equal, ICLR 2026, arXiv 2506.11024",
)
@dataclass(frozen=True, kw_only=True)
class FedMosaic(Method):
    """Train P_i, q_i of ``B (P_i A x + q_i)`` beside a frozen mixture P', q' of the other sites'.

    ``y = W0 x + s [beta B (P' A x + q') + (1 - beta) B (P_i A x + q_i)]`` with A and B orthonormal, common and frozen
    and beta a gate of the layer. ``P' = sum over j != i of w_ij P_j``, ``w_ij = softmax(S_ij / temperature)``, S being
    the similarity of moving averages ``G <- (G + g) / 2`` of a frozen probe's gradient. The last block of each of four
    parts carries P and q; other blocks have plain adapters, shared among sites of equal shapes. Only P_i costs rank.

    Args:
        similarity: ``columns`` (mean of the columns' cosines, the released code) or ``flattened`` (the paper).
        temperature: of the softmax, > 0.
        every: steps between two gradients of the probe, >= 1.
        noise: standard deviation added to a gradient before it is sent, >= 0. This is not differential privacy.

    Differences from the paper: the gate is a softmax over both copies, token by token; the probe is a random layer on
    the site's own frozen features; the head stays; the server holds each site's last P and G; one learning rate.
    """

    slots: ClassVar[tuple[str, ...]] = ("personal",)
    own: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ("general",)
    gated: ClassVar[bool] = True
    shifted: ClassVar[bool] = True
    sends: ClassVar[tuple[str, ...]] = ("shared", "probe")
    also_sends: ClassVar[tuple[str, ...]] = ("P and q", "own adapters of other blocks", "gradient of a frozen probe")
    keeps: ClassVar[tuple[str, ...]] = ("gates", "head", "copy of what it last sent, to predict with")
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"temperature": ("log", 0.05, 2.0)}

    similarity: str = "columns"
    temperature: float = 0.5
    every: int = 10
    noise: float = 1e-4

    def __post_init__(self) -> None:
        one_of("method.similarity", self.similarity, colora.SIMILARITIES)
        if not (0 < self.temperature < float("inf") and 0 <= self.noise < float("inf") and self.every >= 1):
            raise ConfigError("a value is out of range", where="method", fix="temperature=0.5 every=10 noise=0.0001")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Every site gets a mixture of its own."""
        return "each"

    def shared(self, name: str) -> bool:
        """Say no of all, for lists: ``also_sends`` and ``keeps`` say in words what leaves and what stays."""
        return False

    def init_server(self, params: Tensors) -> State:
        """Return P and q of zero: what an unseen site gets before anybody sent."""
        return {"shared": pick(colora.first(colora.fix(params)), colora.inner)}

    def init_site(self, params: Tensors) -> State:
        """Return fixed factors, gates, head, and plain factors before training (both copies start from these)."""
        return {"private": colora.fix(params)}

    def broadcast(self, server: State, site: str) -> State:
        """Return the mixture of the others' tensors, and the site's own in case it lost its copy of them."""
        models = {group[4:]: tensors for group, tensors in server.items() if group.startswith("own:")}
        if site not in models:
            return {"shared": server["shared"]}
        probes = {name: server[f"probe:{name}"]["gradient"] for name in models}
        return {"shared": colora.message(models, probes, site, self.similarity, self.temperature), "own": models[site]}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train P, q, plain factors, gates and head; meanwhile average the probe's gradient."""
        fixed, others = state["private"], received.get("shared", {})
        own = state.get("shared") or received.get("own", {})
        off = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in self.personal(received, state).items()}
        fitted = learner.fit(
            {**colora.first(fixed), **own},
            loss=lambda params, batch: learner.loss(colora.assemble(others, params, fixed), batch),
        )
        # The batches of the fit once more: the frozen probe does not mind that they were trained on meanwhile.
        few = itertools.islice(learner.batches(learner.settings.steps, "fit"), 0, None, self.every)
        seen = [colora.probe_gradient(learner.features(off, b).cpu(), b.labels, len(learner.data.classes)) for b in few]
        gradient = colora.blurred(seen, self.noise, torch_generator(learner.seed, "probe", learner.round, learner.site))
        sent = pick(fitted, lambda n: colora.inner(n) or slot_of(n) == "personal")
        kept = {n: fitted[n] if n in fitted and n not in sent else t for n, t in fixed.items()}
        return {"shared": sent, "probe": {"gradient": gradient}}, {"private": kept, "shared": sent}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Keep what each site sent and the moving average of its gradient; nothing is merged but for unseen sites."""
        kept = dict(server)
        for reply in (r for r in replies if r.state.get("shared")):
            new, name = reply.state["probe"], f"probe:{reply.site}"
            kept[name] = {"gradient": (server.get(name, new)["gradient"] + new["gradient"]) / 2}
            kept[f"own:{reply.site}"] = reply.state["shared"]
        models = {g: pick(t, colora.inner) for g, t in kept.items() if g.startswith("own:")}
        return {**kept, "shared": colora.mix(models, dict.fromkeys(models, 1.0))} if models else kept

    def personal(self, received: State, state: State) -> Tensors:
        """Return both copies as adapters ``(P A, B)`` with shifts, beside gates and head."""
        own = state.get("shared") or received.get("own", {})
        return colora.assemble(received.get("shared", {}), own, state["private"])
