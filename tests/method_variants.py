"""Every registered method with its defaults, and variants of its options: what the conformance suite runs."""

from __future__ import annotations

from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.method import METHODS, Method, make

# Noise from the operating system is not the same twice, and nobody tells these methods how many sites there are.
CHOSEN = {"dpfed": {"noise_seed": 1, "sigma": 1e-6, "cohort": 3.0}}
# What an experiment has to say before such a method is let in; others need nothing.
PRIVATE = {"federation": {"weights": "equal"}, "gate": {"norm": 0.0, "factor": 0.0}, "privacy": {"delta": 1e-3}}
VARIANTS: dict[str, Method] = {name: make(name, CHOSEN.get(name)) for name in sorted(METHODS)}
VARIANTS |= {
    "fedopal-local-head": make("fedopal", {"head": "local"}),
    "fedopal-in-turn": make("fedopal", {"training": "in-turn", "warmup": 0}),
    "fedopal-ffa": make("fedopal", {"aggregation": "ffa", "warmup": 0}),
    "fedopal-svd": make("fedopal", {"aggregation": "svd", "regulariser": "W-A2"}),
    "fedopal-R-cos": make("fedopal", {"regulariser": "R-cos", "routing": "personal_only", "warmup": 0}),
    "fedopal-R-feat": make("fedopal", {"regulariser": "R-feat", "routing": "general_only", "warmup": 0}),
    "feddpa-t-local-head": make("feddpa-t", {"head": "local", "share": 0.3}),
    "feddpa-f-local-head": make("feddpa-f", {"head": "local", "last": 0.5}),
    "fedalt-products": make("fedalt", {"rest": "products"}),
    "fedalt-local-head": make("fedalt", {"head": "local"}),
    "pf2lora-small-client": make("pf2lora", {"client": 0.5, "lower": 2}),
    "pf2lora-local-head": make("pf2lora", {"head": "local"}),
    "fedmosaic-flattened": make("fedmosaic", {"similarity": "flattened", "temperature": 0.05, "every": 1}),
    "hilora-local-head": make("hilora", {"head": "local", "clusters": 0, "normalise": False}),
    "hilora-adapter": make("hilora", {"basis": "adapter", "clusters": 3, "gamma_leaf": 0.0}),
    "hetlora-prune": make("hetlora", {"gamma": 0.75, "lam": 0.1}),
    "hetlora-images": make("hetlora", {"weighting": "images"}),
    "lora-fair-project": make("lora-fair", {"lam": 0.0}),
    "fedrot-lora-soft": make("fedrot-lora", {"soft": 0.5}),
    "flexlora-keep": make("flexlora", {"rest": "keep"}),
    "hetlora-keep": make("hetlora", {"rest": "keep"}),
    "hetlora-keep-prune": make("hetlora", {"rest": "keep", "gamma": 0.75, "lam": 0.1}),
    "data-vectors-sum": make("data-vectors", {"coefficients": "sum"}),
    "data-vectors-images-every": make("data-vectors", {"coefficients": "images", "when": "every"}),
    "data-vectors-tuned": make("data-vectors", {"coefficients": "tuned"}),
    "data-vectors-ensemble": make("data-vectors", {"predicts": "ensemble", "when": "every"}),
    "data-vectors-own": make("data-vectors", {"predicts": "own"}),
    "med-duallora-shared-head": make("med-duallora", {"head": "shared"}),
    "sdflora-local-head": make("sdflora", {"head": "local"}),
    "dpfed-plain": make("dpfed", {"noise_seed": 2, "sigma": 1e-6, "cohort": 2.0, "post": 0.0, "clip": 10.0}),
    "fedrep-much-head": make("fedrep", {"head_share": 0.9}),
    "fedrep-little-head": make("fedrep", {"head_share": 0.1}),
    "ditto-far": make("ditto", {"lam": 0.0, "share": 0.3}),
    "apfl-fixed": make("apfl", {"adaptive": False, "alpha": 0.25}),
    "apfl-global": make("apfl", {"alpha": 0.0, "alpha_lr": 1.0}),
    "fedprox-strong": make("fedprox", {"mu": 1.0}),
    "fedprox-zero": make("fedprox", {"mu": 0.0}),
    "fedavgm-plain": make("fedavgm", {"server_lr": 1.0, "beta1": 0.0}),
    "fedadam-fast": make("fedadam", {"server_lr": 0.1, "beta1": 0.5, "beta2": 0.9, "tau": 0.01}),
    "fedamp-absolute": make("fedamp", {"relative": False, "sigma": 50.0, "compared": "all"}),
    "fedacs-updates": make("fedacs", {"similarity": "updates", "compared": "all", "step": 0.5}),
    "fedacs-rising": make("fedacs", {"threshold": "rising", "halflife": 1}),
    "fedacs-quantile": make("fedacs", {"threshold": "quantile", "quantile": 0.8, "lam": 0.0}),
    "fedacs-none": make("fedacs", {"threshold": "none"}),
    "ifca-three": make("ifca", {"clusters": 3}),
}
