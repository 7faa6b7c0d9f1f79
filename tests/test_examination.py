"""What ends a run before or after its rounds: a site held out of one, a site that cannot be examined."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_federation import CLASSES, SITES, backbone_of, initial_params

from confrere.config import validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError, RunError
from confrere.examination import examine_sites
from confrere.federation.transport import Failure
from confrere.method import Reply, Request, make
from confrere.opening import open_data
from confrere.record.run import Run


def test_the_only_site_cannot_be_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    make_microscopy(tmp_path / "data", seed=3, sites=2, images=(16, 16), size=32)
    first, second = sorted(p for p in (tmp_path / "data").iterdir() if p.is_dir())
    shutil.rmtree(second)
    values = {"path": str(tmp_path / "data"), "hold_out": first.name, "backbone": {"name": "test-vit"}}
    with pytest.raises(ConfigError, match="only site") as error:
        open_data(validate(values), tmp_path / "run")
    assert error.value.code == "hold-out"


def test_a_site_that_cannot_be_examined_is_named(tmp_path: Path) -> None:
    class Silent:
        def sites(self) -> tuple[str, ...]:
            return SITES

        def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
            return [Failure(site, "the disk is gone") for site in requests]

    method, run = make("fedit"), Run(tmp_path)
    run.commit(1, method.init_server(initial_params(backbone_of(method), method, "")))
    experiment = validate({"path": "x", "method": {"name": "fedit"}})
    with pytest.raises(RunError, match=r"the disk is gone.*site a") as error:
        examine_sites(experiment, CLASSES, SITES, run, Silent(), 1)
    assert error.value.code == "examination"
