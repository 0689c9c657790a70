"""What memnoise cannot work with is refused in one sentence, and the image still comes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.conftest import HOSTS, Studio, open_host


@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
def test_flow_models(tmp_path_factory: pytest.TempPathFactory, method: str) -> None:
    with open_host("double", tmp_path_factory) as host:
        studio = Studio(host)
        host.load("sd3")
        euler = {"sampler_name": "Euler"}
        run = studio.run({"method": method}, **euler)
        assert "flow models such as SD3" in (run.read("Memnoise failed") or "")
        assert np.array_equal(run.images[0], studio.run(**euler).images[0])
        answer = studio.answer([True, {"method": method, "fail_instead": True}], **euler)
        assert answer.status == 500 and "flow models such as SD3" in answer.detail


def test_gradients_with_lowvram(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_host("double", tmp_path_factory, cmd_args=("--lowvram",)) as host:
        studio = Studio(host)
        assert "--lowvram" in (studio.run({"method": "per_sample"}).read("Memnoise failed") or "")
        assert studio.run({}).read("Memnoise failed") is None


def test_medvram_changes_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that are moved in and out, as --medvram does, give the same gradient."""
    pictures = {}
    for args in ((), ("--medvram",)):
        kind = HOSTS[-1]
        given = {"extra_args" if kind == "webui" else "cmd_args": args}
        with open_host(kind, tmp_path_factory, **given) as host:
            settings = {"method": "per_sample", "target": 0.8, "target_kind": "fraction"}
            run = Studio(host).run(settings, batch_size=2)
            assert run.read("Memnoise failed") is None and run.number("backward rows") > 0
            pictures[args] = run.pictures
    plain, moved = pictures.values()
    assert all(np.array_equal(a, b) for a, b in zip(plain, moved))


def test_schema_respects_the_apis_password(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_host("double", tmp_path_factory, cmd_args=("--api-auth", "user:word")) as host:
        assert host.get("/memnoise/v1/schema").status_code == 200
        assert host.get("/memnoise/v1/schema", auth=("user", "wrong")).status_code == 401


def test_no_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_host("double", tmp_path_factory, cmd_args=("--nowebui",)) as host:
        studio = Studio(host)
        assert studio.run({}).read("Memnoise failed") is None
        from tests.contract.test_requests import axis_labels

        assert sum(label.startswith("[Memnoise]") for label in axis_labels(studio)) > 10


def test_the_host_swallowed_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_host("double", tmp_path_factory) as host:
        studio = Studio(host)
        assert host.startup_reports == []
        for settings in ({}, {"method": "per_sample", "max_steps": 2}, None):
            studio.run(settings, batch_size=2, n_iter=2)
            assert host.reports == []
