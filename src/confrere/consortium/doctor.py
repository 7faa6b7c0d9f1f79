"""``confrere doctor --site KIT``: what would keep this machine from taking part as a site, found before it matters.

Each check asks what a site asks when it runs, and the next one goes on where it can. Nothing is sent but an empty
request to the coordinator, without a key; nothing waits longer than its time-out.
"""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import confrere
from confrere.backbones import default_size
from confrere.config import Experiment, override, read, validate
from confrere.consortium import keys, kit, policy, spent
from confrere.consortium.authority import colons, now
from confrere.consortium.kit import Kit
from confrere.consortium.lead import across
from confrere.consortium.policy import Policy
from confrere.consortium.probe import probe
from confrere.data.federation import Federation, load_federation
from confrere.doctor.data import data_findings
from confrere.doctor.finding import Finding, attempt
from confrere.doctor.machine import fault, machine_findings, requirements
from confrere.doctor.model import model_findings
from confrere.doctor.places import cache_findings, other_cache, out_findings, room
from confrere.errors import NetworkError, RunError
from confrere.federation.ledger import FILE
from confrere.prefix import cache_dir

SOON = timedelta(days=30)
LEAST_DISK = 2_000_000_000
"""Bytes for a model, decoded images and the states of a run."""
NEAR = 2.0
"""Seconds of clock skew that are worth a warning: Flower refuses 5."""
STEPS = {
    "dns": ("net-dns",),
    "port": ("net-refused", "net-time-out", "net-unreachable"),
    "tls": ("net-plaintext", "tls-ca", "tls-self-signed", "tls-expired", "tls-early", "tls-name", "tls-handshake"),
    "clock": ("clock-skew", "net-answer"),
}
"""What is looked at on the way to the coordinator, in order, and the errors that end the way there."""


def examine_site(
    folder: Path,
    *,
    data: Path | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    timeout: float = 5.0,
) -> Iterator[Finding]:
    """Yield what was found, check by check.

    Args:
        folder: kit of the site.
        data: its images or table; without it data and backbone are not looked at.
        config: TOML file of the experiment that is planned; the default experiment without it.
        overrides: ``key.path=value`` of that experiment.
        out: where the site will keep its state.
        timeout: seconds, for the name and again for the connection.
    """
    found: list[Finding] = []
    own = attempt("kit", lambda: kit.load(folder, "site"), found)
    yield from found
    yield from _kit(own) if own is not None else ()
    found = []
    rules = attempt("policy", lambda: policy.load(folder / "policy.toml"), found)
    yield from found or [Finding("ok", "policy", "can be read", str(folder / "policy.toml"))]
    if own is not None:
        yield from network_findings(own, timeout)
    experiment = None
    if own is not None and data is not None:
        found = []
        experiment = attempt("experiment", lambda: _experiment(own, data, config, overrides), found)
        yield from found
    yield from machine_findings(experiment)
    yield from _versions(own)
    if out is not None:
        yield from out_findings(out, new=False)
        yield from _spent(out, rules)
    found, usable = cache_findings()
    yield from found
    yield room("disk", out or cache_dir(), LEAST_DISK, RunError.exit_code)
    if own is not None and experiment is not None:
        with other_cache(usable):
            yield from _data(own, experiment, rules, out)


def network_findings(own: Kit, timeout: float) -> Iterator[Finding]:
    """Yield one finding a step to the coordinator, up to the first that fails."""
    proxy = urllib.request.getproxies().get("https")
    if proxy and not urllib.request.proxy_bypass(own.address):
        what = "a proxy is set for HTTPS: Flower would use it, and it must not open TLS; below the way without it"
        yield Finding("warning", "proxy", what, "HTTPS_PROXY", f"set NO_PROXY={own.address}")
    passed = {"dns": f"{own.address} is known", "port": f"{own.port} is open", "tls": "the certificate is right"}
    try:
        seen = probe(own.address, own.port, own.folder / "ca.crt", timeout=timeout)
    except NetworkError as error:
        for step, codes in STEPS.items():
            if error.code in codes:
                yield Finding.of(step, error)
                return
            yield Finding("ok", step, passed[step], own.target)
        raise
    passed["tls"] = f"{seen.protocol}, certificate for {', '.join(seen.names)} until {seen.expires:%Y-%m-%d}"
    for step, what in passed.items():
        yield Finding("ok", step, what, own.target)
    what = f"the coordinator's is {abs(seen.skew):.0f} s {'ahead' if seen.skew > 0 else 'behind'}"
    if abs(seen.skew) > NEAR:
        fix = "set both by NTP: Flower refuses a site that is 5 s ahead"
        yield Finding("warning", "clock", what, own.target, fix)
    else:
        yield Finding("ok", "clock", what, own.target)


def _kit(own: Kit) -> Iterator[Finding]:
    what = f"site {own.site} of {own.consortium}, {len(own.sites)} sites, valid until {own.expires:%Y-%m-%d}"
    if own.expires - now() < SOON:
        fix = "ask for a renewed kit (`confrere provision --renew`)"
        yield Finding("warning", "kit", what, str(own.folder), fix)
    else:
        yield Finding("ok", "kit", what, str(own.folder))
    yield Finding("ok", "authority", f"compare by telephone: {colons(own.ca)}")
    yield Finding("ok", "node key", f"compare by telephone: {keys.fingerprint(own.sites[own.site].node)}")


def _versions(own: Kit | None) -> Iterator[Finding]:
    needed = requirements("flower")
    wrong = [found for one in needed if (found := fault(one))]
    for what, fix in wrong:
        yield Finding("error", "versions", what, fix=fix, exit_code=8, code="missing-extra")
    if not wrong:
        names = (*(one.name for one in needed), "torch", "transformers")
        there = (f"{name} {metadata.version(name)}" for name in names)
        yield Finding("ok", "versions", f"confrere {confrere.__version__}, {', '.join(there)}")
    if own is not None and own.confrere != confrere.__version__:
        what = f"the kit was made by confrere {own.confrere}, {confrere.__version__} is installed"
        yield Finding("warning", "versions", what, fix="install the same version everywhere")


def _experiment(own: Kit, data: Path, config: Path | None, overrides: Sequence[str]) -> Experiment:
    """Return the experiment as the coordinator would send it, over this site's data."""
    values = {**(read(config) if config else {}), "path": str(data.resolve())}
    return across(validate(override(values, overrides)), own.classes)[0]


def _spent(out: Path, rules: Policy | None) -> Iterator[Finding]:
    """Yield what noise has cost so far, over all jobs of a state folder."""
    found: list[Finding] = []
    known = attempt("epsilon", lambda: spent.spent_ever(out / FILE), found)
    yield from found
    if known is None:
        return
    jobs = len({name.split("/")[0] for name in known})
    epsilon, delta = spent.total(known.values())
    what = f"epsilon {epsilon:.4g}, delta {delta:.4g} in all" if math.isfinite(epsilon) else "no epsilon holds any more"
    what += f", after {len(known)} trainings of {jobs} jobs" if known else ", nothing was trained"
    open_ = sum(not one.unit for one in known.values())
    what += f", {open_} of them without noise" if open_ else ""
    most = rules.most_epsilon_ever if rules is not None else 0.0
    if most and epsilon >= most:
        yield Finding("warning", "epsilon", what, str(out), "nothing: no further job may begin, see most_epsilon_ever")
    else:
        yield Finding("ok", "epsilon", what + (f"; the policy allows {most:g}" if most else ""), str(out))


def _data(own: Kit, experiment: Experiment, rules: Policy | None, out: Path | None) -> Iterator[Finding]:
    """Yield what stands about the data, the policy's word on the experiment, and the weights."""
    found: list[Finding] = []
    federation = attempt("data", lambda: _opened(own, experiment), found)
    yield from found
    if rules is not None:
        training = federation.sheet["sites"][own.site]["splits"]["train"]["images"] if federation else None
        found = []
        attempt("policy", lambda: policy.check(rules, experiment, examples=training), found)
        if out is not None and not found:
            attempt("policy", lambda: spent.check_ever(rules, out / FILE, spent.budgets(experiment, "new")), found)
        yield from found or [
            Finding("ok", "policy", f"allows {experiment.method['name']} on {experiment.backbone.name}")
        ]
    if federation is not None:
        yield from data_findings(experiment, federation)
        yield from model_findings(experiment, federation, None)


def _opened(own: Kit, experiment: Experiment) -> Federation:
    return load_federation(
        Path(experiment.path),
        options=experiment.data,
        image_size=experiment.data.image_size or default_size(experiment.backbone.name, experiment.backbone.image_size),
        seed=experiment.split_seed,
        cache=cache_dir(),
        only=own.site,
    )
