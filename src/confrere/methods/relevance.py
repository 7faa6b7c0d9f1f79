"""The server's side of FedMosaic: what each site sent last, mixed for every other site by how alike their tasks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from confrere.adapters import colora
from confrere.errors import ConfigError
from confrere.method import Method, Reply, one_of
from confrere.tensors import State, Tensors, pick


@dataclass(frozen=True, kw_only=True)
class Relevance(Method):
    """Keep what each site sends, and send each the mixture of the others'. Not registered: a base class.

    Groups of the server's state: ``shared`` (the mean P and q, for unseen sites), ``own:<site>`` (what it sent last)
    and ``probe:<site>`` (the moving average of its gradient). A site receives the mixture as ``others``, a name that
    nothing it sends has: so both copies can be told apart in what it predicts with before it is averaged.
    """

    sends: ClassVar[tuple[str, ...]] = ("shared", "probe")
    targets: ClassVar[tuple[str, ...]] = ("label",)

    similarity: str = "columns"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        one_of("method.similarity", self.similarity, colora.SIMILARITIES)
        if not 0 < self.temperature < float("inf"):
            raise ConfigError("a value is out of range", where="method.temperature", fix="temperature=0.5")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Every site gets a mixture of its own."""
        return "each"

    def init_server(self, params: Tensors) -> State:
        """Return P and q of zero: what an unseen site gets before anybody sent."""
        return {"shared": pick(colora.first(colora.fix(params)), colora.inner)}

    def broadcast(self, server: State, site: str) -> State:
        """Return the mixture of the others' tensors, and the site's own in case it lost its copy of them."""
        if f"own:{site}" not in server:
            return {"others": server["shared"]}
        others = colora.message(server, site, self.similarity, self.temperature)
        return {"others": others, "own": server[f"own:{site}"]}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Keep what each site sent and the moving average of its gradient; nothing is merged but for unseen sites."""
        kept = dict(server)
        for reply in (r for r in replies if r.state.get("shared")):
            new, name = reply.state["probe"], f"probe:{reply.site}"
            kept[name] = {"gradient": (server.get(name, new)["gradient"] + new["gradient"]) / 2}
            kept[f"own:{reply.site}"] = reply.state["shared"]
        models = {site: pick(tensors, colora.inner) for site, tensors in colora.last_sent(kept).items()}
        return {**kept, "shared": colora.mix(models, dict.fromkeys(models, 1.0))} if models else kept
