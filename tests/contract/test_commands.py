"""The command line against a running host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib_memnoise import __version__
from lib_memnoise.__main__ import main
from tests.contract.conftest import Studio, open_host
from tests.contract.test_scores import forget, score
from tests.test_command_line import refusal

GIVEN = ("--width", "64", "--height", "64", "--steps", "8", "--cfg", "6", "--sampler", "DDIM")


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(argv)
    return capsys.readouterr().out


def test_score(studio: Studio, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("score", "a fox", "a cat", "--url", address, *GIVEN, "--seed", "7", "--seed", "8")
    forget(studio)
    expected = score(studio, prompts=["a fox", "a cat"], seeds=[7, 8])
    found = json.loads(said(capsys, *command, "--json"))
    assert [image["seed"] for image in found["images"]] == [7, 8, 7, 8]
    assert [image["score"] for image in found["images"]] == [image["score"] for image in expected["images"]]
    text = said(capsys, *command, "--words")
    assert all(f"{image['score']:.4f}" in text for image in expected["images"])
    assert "1.00" in text and "not calibrated, first timestep 876" in text


def test_calibrate(studio: Studio, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(said(capsys, "calibrate", "--url", address + "/", *GIVEN, "--json"))
    assert made.pop("notes") == []
    assert made in studio.host.get("/memnoise/v1/calibrations").json()
    text = said(capsys, "calibrate", "--url", address, *GIVEN)
    assert f"threshold {made['threshold']:.4g} ({made['promise']})" in text and "120 built-in prompts" in text
    found = json.loads(said(capsys, "score", "a fox", "--url", address, *GIVEN, "--json"))
    assert found["calibrated"] and found["threshold"] == made["threshold"]
    assert "120 built-in prompts" in said(capsys, "score", "a fox", "--url", address, *GIVEN)


def test_calibrate_with_captions_of_a_file(
    studio: Studio, address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\ufeff" + "".join(f"a fox, with {k} «balloons»\n\n" for k in range(300)), encoding="utf-8")
    main(["calibrate", "--url", address, *GIVEN, "--prompts", str(captions), "--json"])
    said_ = capsys.readouterr()
    made = json.loads(said_.out)
    assert (made["source"], made["count"]) == ("own", 256)
    assert "256 of 300 captions are taken, at even distances." in said_.err
    assert any("«balloons»" in note for note in made["notes"])
    captions.write_text("a fox\n")
    assert "it takes 20 different prompts; these are 1" in refusal(
        "calibrate", "--url", address, *GIVEN, "--prompts", str(captions)
    )
    captions.write_bytes(b"\xff\xfea")
    assert "is no text file in UTF-8" in refusal("calibrate", "--url", address, *GIVEN, "--prompts", str(captions))
    absent = str(tmp_path / "absent.txt")
    assert "No such file" in refusal("calibrate", "--url", address, *GIVEN, "--prompts", absent)
    with studio.options({"outdir_txt2img_samples": str(tmp_path)}):
        assert "0 pictures of" in refusal("calibrate", "--url", address, *GIVEN, "--recent")


def test_what_generates(studio: Studio) -> None:
    found = studio.host.get("/memnoise/v1/about").json()
    assert found["memnoise"] == __version__ and found["checkpoint"] == "sd1" and found["parameterization"] == "eps"
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    made = studio.run({"method": "none"})
    assert (made.info["sd_model_name"], made.info["sd_model_hash"]) == (found["checkpoint"], found["hash"])
    assert studio.host.post("/memnoise/v1/peak_memory", {}).json() == {"bytes": None}  # no GPU


def test_refusals(studio: Studio, address: str) -> None:
    assert "no address" in refusal("score", "a fox", "--url", "webui")
    assert "nothing answers" in refusal("score", "a fox", "--url", "http://127.0.0.1:9")
    assert "has no memnoise" in refusal("score", "a fox", "--url", f"{address}/elsewhere")
    assert 'sampler_name = "Eule" is not valid (did you mean "Euler"?)' in refusal(
        "score", "a fox", "--url", address, "--sampler", "Eule"
    )
    assert "a prompt is needed" in refusal("score", "--url", address)
    assert "cfg_scale = 0 is not valid" in refusal("score", "a fox", "--url", address, "--cfg", "0")
    assert "an empty prompt has no score" in refusal("score", "", "--url", address)


def test_a_password(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.browser import served

    pytest.importorskip("uvicorn")
    with (
        open_host("double", tmp_path_factory, cmd_args=("--api-auth", "me:secret")) as host,
        served(host.app) as url,
    ):
        command: tuple[Any, ...] = ("score", "a fox", "--url", url, *GIVEN, "--json")
        assert "--auth USER:PASSWORD" in refusal(*command)
        assert "--auth USER:PASSWORD" in refusal(*command, "--auth", "me:wrong")
        assert len(json.loads(said(capsys, *command, "--auth", "me:secret"))["images"]) == 1
