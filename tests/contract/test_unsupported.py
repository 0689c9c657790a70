"""What memnoise cannot work with is refused in one sentence, and the image still comes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.contract.conftest import HOSTS, REPOSITORY, Studio, open_host


@pytest.mark.parametrize("kind", ["double", "patcher"])
@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
def test_flow_models(tmp_path_factory: pytest.TempPathFactory, method: str, kind: str) -> None:
    with open_host(kind, tmp_path_factory) as host:
        studio = Studio(host)
        host.load("sd3")
        euler = {"sampler_name": "Euler"}
        run = studio.run({"method": method}, **euler)
        assert "flow models such as SD3" in (run.read("Memnoise failed") or "")
        assert np.array_equal(run.images[0], studio.run(**euler).images[0])
        answer = studio.answer([True, {"method": method, "fail_instead": True}], **euler)
        assert answer.status == 500 and "flow models such as SD3" in answer.detail


@pytest.mark.parametrize(("without", "said"), [(None, "1.10 or later"), ("sd_samplers_cfg_denoiser", "SD.Next")])
def test_hosts_without_the_hook(monkeypatch: pytest.MonkeyPatch, without: str | None, said: str) -> None:
    """As before 1.10, and as SD.Next."""
    from tests.hosts.double.host import Double

    with Double(None) as nothing:  # the host's modules are there
        from modules import scripts

        plain = Studio(nothing).run()
        monkeypatch.delattr(scripts.Script, "process_before_every_sampling")
        monkeypatch.setattr(scripts.ScriptRunner, "process_before_every_sampling", lambda self, p, **kwargs: None)
        if without:
            monkeypatch.setitem(sys.modules, f"modules.{without}", None)
        with Double(REPOSITORY) as host:
            assert host.startup_reports == []
            studio = Studio(host)
            for args in ([True], [True, {"tau": 500}], [{"method": "per_sample"}]):
                run = studio.answer(args)
                assert run.status == 200 and np.array_equal(run.image, plain.images[0])
                assert said in run.infotexts[0].split("Memnoise failed: ")[1]
            for args in ([False], [False, {"tau": 500}], [{"enabled": False}]):
                assert "Memnoise" not in studio.answer(args).infotexts[0]
            assert host.reports == []
            answer = studio.answer([True, {"fail_instead": True}])
            assert answer.status == 500 and said in answer.detail
    monkeypatch.undo()


def test_gradients_with_lowvram(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_host("double", tmp_path_factory, cmd_args=("--lowvram",)) as host:
        studio = Studio(host)
        assert "--lowvram" in (studio.run({"method": "per_sample"}).read("Memnoise failed") or "")
        settings = {"method": "per_sample", "rule": "forward", "target": 0.9, "target_kind": "fraction"}
        forward = studio.run({**settings, "max_steps": 4})
        assert forward.read("Memnoise failed") is None and forward.number("steps taken") > 0
        assert forward.number("magnitude after") < forward.number("magnitude")
        assert studio.run({}).read("Memnoise failed") is None


def test_medvram_changes_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that are moved in and out, as --medvram does, give the same gradient."""
    pictures = {}
    for args in ((), ("--medvram",)):
        kind = "webui" if "webui" in HOSTS else "double"
        given = {"extra_args" if kind == "webui" else "cmd_args": args}
        with open_host(kind, tmp_path_factory, **given) as host:
            settings = {"method": "per_sample", "target": 0.8, "target_kind": "fraction"}
            run = Studio(host).run(settings, batch_size=2)
            assert run.read("Memnoise failed") is None and run.number("backward rows") > 0
            pictures[args] = run.pictures
    plain, moved = pictures.values()
    assert all(np.array_equal(a, b) for a, b in zip(plain, moved))


def test_no_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_host("double", tmp_path_factory, cmd_args=("--nowebui",)) as host:
        studio = Studio(host)
        assert studio.run({}).read("Memnoise failed") is None
        from tests.contract.test_requests import plot_controls

        assert sum(label.startswith("[Memnoise]") for label in plot_controls(studio)[0]["choices"]) > 10


@pytest.mark.parametrize("kind", ["double", "patcher"])
def test_the_host_swallowed_nothing(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    with open_host(kind, tmp_path_factory) as host:
        studio = Studio(host)
        assert host.startup_reports == []
        for settings in ({}, {"method": "per_sample", "max_steps": 2}, None):
            studio.run(settings, batch_size=2, n_iter=2)
            assert host.reports == []
