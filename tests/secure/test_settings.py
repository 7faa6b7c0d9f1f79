"""What secure aggregation excludes is said before round 1, naming key and fix."""

from __future__ import annotations

from typing import Any

import pytest
from method_variants import PRIVATE

from confrere.config import override, validate
from confrere.errors import ConfigError
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.settings import check_cohort
from confrere.method import METHODS

ON = {
    "path": "x",
    "controls": (),
    "secure": {"aggregation": True},
    "gate": {"norm": 0.0, "factor": 0.0},
    "method": {"name": "fedit"},
}


def test_a_masked_experiment_has_a_secure_defence_and_its_controls_have_none() -> None:
    experiment = validate({**ON, "controls": ("local", "pooled")})
    assert experiment.masked
    assert isinstance(experiment.build_defence({}), Secure)
    for control in ("local", "pooled"):
        assert not experiment.for_method(control).masked
        assert not isinstance(experiment.for_method(control).build_defence(), Secure)
    assert not validate({"path": "x"}).masked


def test_every_method_that_sends_a_sum_may_be_masked_and_no_other() -> None:
    for name, cls in METHODS.items():
        if cls().needs == "sum":
            more = PRIVATE if name == "dpfed" else {}
            assert validate({**ON, **more, "method": {"name": name}}).secure.aggregation
        else:
            with pytest.raises(ConfigError, match="has to see each site's update") as caught:
                validate({**ON, "method": {"name": name}})
            assert caught.value.code == "secure"


@pytest.mark.parametrize(
    ("assignment", "where"),
    [
        ("method={name='fedopal', aggregation='svd'}", "secure.aggregation"),
        ("federation.rule=median", "federation.rule"),
        ("federation.canonical=true", "federation.canonical"),
        ("gate.norm=8.0", "gate.norm"),
        ("gate.factor=8.0", "gate.factor"),
        ("attack.sites=['north']", "attack.sites"),
    ],
)
def test_what_looks_at_single_updates_is_refused(assignment: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override(ON, [assignment]))
    assert (caught.value.code, caught.value.where) == ("secure", where)
    assert caught.value.fix


@pytest.mark.parametrize(("asked", "threshold"), [(1, 0), (4, 2), (4, 5)])
def test_a_threshold_that_cannot_be_kept_is_refused(asked: int, threshold: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cohort(asked, threshold)
    assert (caught.value.code, caught.value.where) == ("secure", "secure.threshold")
    check_cohort(4, 3)


def test_ranks_that_differ_cannot_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """No registered method of a sum carries them yet; one that would is refused all the same."""
    monkeypatch.setattr(METHODS["fedit"], "unequal", True)
    values: dict[str, Any] = {**ON, "adapter": {"ranks": {"north": 4}}}
    with pytest.raises(ConfigError, match="cannot be added up"):
        validate(values)
