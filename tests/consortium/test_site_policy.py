"""A site's policy has the last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from method_variants import PRIVATE

from confrere.backbones import REGISTRY
from confrere.config import Experiment, validate
from confrere.consortium.policy import TEMPLATE, Policy, check, check_request, load
from confrere.errors import ConfigError, PolicyError
from confrere.method import METHODS, Request

PIN = str(REGISTRY["dinov2-small-imgfocus"].sha256)


def experiment(method: str = "fedit", **values: Any) -> Experiment:
    return validate({"path": "x", "method": method, "controls": ("local",), **values})


def policy(folder: Path, text: str) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    return load(path)


def refusal(rules: Policy, asked: Experiment, *, examples: int | None = 100) -> str:
    with pytest.raises(PolicyError) as caught:
        check(rules, asked, examples=examples)
    assert caught.value.exit_code == 10
    assert caught.value.where.startswith("policy: ")
    assert caught.value.fix
    return caught.value.code


def test_the_template_is_the_default(tmp_path: Path) -> None:
    assert policy(tmp_path, TEMPLATE) == policy(tmp_path, "") == Policy()
    for key in Policy.model_fields:
        assert f"{key} = " in TEMPLATE or f"[{key}]" in TEMPLATE, key


def test_the_commented_lines_of_the_template_are_right(tmp_path: Path) -> None:
    lines = [line.removeprefix("# ") for line in TEMPLATE.splitlines() if "=" in line or "[" in line]
    found = policy(tmp_path, "\n".join(lines))
    assert found.methods == ("fedopal", "fedit", "local")
    assert found.backbones == {"dinov2-small-imgfocus": PIN}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_by_default_adapter_weights_leave_and_nothing_else(name: str) -> None:
    method = METHODS[name]
    if method.pools or set(method.sends) - {"shared"}:
        expected = "policy-method" if method.pools else "policy-group"
        assert refusal(Policy(), experiment(name, controls=())) == expected
    else:
        needed = PRIVATE if method().release() else {}
        check(Policy(), experiment(name, controls=(), **needed), examples=100)


def test_every_rule_refuses_with_its_own_code() -> None:
    plain = experiment()
    named = Policy(methods=("fedit", "local"))
    check(named, plain, examples=100)
    assert refusal(named, experiment("fedopal")) == "policy-method"
    assert refusal(Policy(methods=("fedit",)), plain) == "policy-method"  # its control
    assert refusal(Policy(), experiment(controls=("pooled",))) == "policy-method"
    assert refusal(Policy(groups=()), plain) == "policy-group"
    assert refusal(Policy(most_rounds=9), plain) == "policy-rounds"
    assert refusal(Policy(least_examples=101), plain) == "policy-examples"
    assert refusal(Policy(secure_aggregation=True), plain) == "policy-secure"
    assert refusal(Policy(differential_privacy=True), plain) == "policy-privacy"
    noisy = experiment(train={"balance": "none"}, privacy={"unit": "record", "epsilon": 8.0, "delta": 1e-5})
    check(Policy(differential_privacy=True, most_epsilon=8.0), noisy, examples=100)
    assert refusal(Policy(differential_privacy=True, most_epsilon=7.9), noisy) == "policy-privacy"
    twice = {"train": {"balance": "none"}, "privacy": {"unit": "record", "epsilon": 8.0, "delta": 1e-5}}
    twice |= {"controls": ("ffa-lora", "local")}  # the first spends as much again
    assert refusal(Policy(differential_privacy=True, most_epsilon=15.9), experiment(**twice)) == "policy-privacy"
    check(Policy(differential_privacy=True, most_epsilon=16.0), experiment(**twice), examples=100)
    loose = {**twice, "privacy": {**twice["privacy"], "delta": 1e-3}}
    with pytest.raises(PolicyError, match=r"privacy\.delta=5e-05 or less for each of 2 trainings") as caught:
        check(Policy(differential_privacy=True), experiment(**loose), examples=100)
    assert (caught.value.code, caught.value.where) == ("policy-privacy", "policy: most_delta")
    check(Policy(differential_privacy=True, most_delta=2e-3), experiment(**loose), examples=100)
    assert refusal(Policy(most_epsilon_ever=99.0, most_epsilon=99.0), experiment(**loose)) == "policy-privacy"
    check(Policy(most_epsilon_ever=99.0), experiment(**loose), examples=100)  # most_delta_ever counts
    hidden = experiment(secure={"aggregation": True}, gate={"norm": 0.0, "factor": 0.0})
    silent = experiment("local", controls=())
    for asked in (hidden, silent):
        check(Policy(secure_aggregation=True, most_rounds=10, least_examples=100), asked, examples=100)
    for rule in (Policy(differential_privacy=True), Policy(most_epsilon=1.0), Policy(most_epsilon_ever=1.0)):
        assert refusal(rule, silent) == "policy-privacy"
        check(rule, experiment("local", controls=(), privacy={"unit": "record", "delta": 1e-5}), examples=100)
    check(Policy(least_examples=101), plain, examples=None)  # before the data are read


def test_how_many_images_there_are_is_not_told() -> None:
    with pytest.raises(PolicyError) as caught:
        check(Policy(least_examples=500), experiment(), examples=137)
    assert "137" not in str(caught.value)


def test_backbones_are_known_or_pinned() -> None:
    check(Policy(), experiment(backbone={"name": "test-vit"}), examples=100)
    for name in ("/etc", "hf:evil/model", "timm:vit", "dinov3"):
        assert refusal(Policy(), experiment(backbone={"name": name})) == "policy-backbone"
    pinned = Policy(backbones={"dinov2-small-imgfocus": PIN.upper(), "test-vit": "a" * 64})
    check(pinned, experiment(), examples=100)  # the registry pins the same
    check(pinned, experiment(backbone={"name": "test-vit", "sha256": "A" * 64}), examples=100)
    for wrong in (
        {"name": "test-vit"},  # any weights
        {"name": "test-vit", "sha256": "b" * 64},
        {"name": "dinov2-small-imgfocus", "sha256": "a" * 64},
        {"name": "dinov2-small"},
    ):
        assert refusal(pinned, experiment(backbone=wrong)) == "policy-backbone"
    assert refusal(Policy(backbones={}), experiment()) == "policy-backbone"


def test_requests_beyond_what_was_checked_are_refused() -> None:
    rules = Policy(most_rounds=3, test_scores=False)
    check_request(rules, Request(kind="train", round=3, state={}))
    check_request(rules, Request(kind="evaluate", round=3, state={}))
    for request, code in (
        (Request(kind="train", round=4, state={}), "policy-rounds"),
        (Request(kind="evaluate", round=4, state={}), "policy-rounds"),
        (Request(kind="evaluate", round=3, state={}, split="test"), "policy-test"),
    ):
        with pytest.raises(PolicyError) as caught:
            check_request(rules, request)
        assert caught.value.code == code
    check_request(Policy(), Request(kind="evaluate", round=3, state={}, split="test"))


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("most_round = 3", "unknown-key", "most_rounds"),
        ("most_rounds = 0", "value", "most_rounds"),
        ("most_rounds = true", "value", "most_rounds"),
        ("secure_aggregation = 1", "value", "secure_aggregation"),
        ("least_examples = '5'", "value", "least_examples"),
        ("methods = ['fedopl']", "unknown-name", "'fedopal'"),
        ("groups = ['shard']", "unknown-name", "'shared'"),
        ("[backbones]\nx = 'abc'", "value", "SHA-256"),
        ("most_rounds = 3 4", "not-toml", "line 1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, code: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(tmp_path, text)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert "policy.toml" in caught.value.where
