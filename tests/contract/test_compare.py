"""The same seeds by several methods, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_memnoise.registry import METHODS
from tests.contract.conftest import ROUNDING, Studio, close
from tests.contract.test_generation import same
from tests.contract.test_scores import SMALL, post, score

PROMPT = "a red fox in the snow"


def decoded(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))


def encoded(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def compare(studio: Studio, **body: Any) -> dict[str, Any]:
    status, answer = post(studio, "compare", {**SMALL, "prompt": PROMPT, "seeds": [7, 8], **body})
    assert status == 200, answer
    return dict(answer)


def test_pictures_and_numbers_are_the_generations_own(studio: Studio) -> None:
    before = studio.run(batch_size=2)
    settings: list[dict[str, Any]] = [{"method": "none"}, {"method": "static", "tau": 500}, {"method": "random_tokens"}]
    answer = compare(studio, methods=settings, reference=encoded(before.pictures[1]))
    assert same(studio.run(batch_size=2), before)  # nothing is left behind
    assert not answer["stopped"] and len(answer["images"]) == 6
    alone = [studio.run(one, batch_size=2) for one in settings]
    for k, cell in enumerate(answer["images"]):
        row, image = divmod(k, 2)
        assert cell["settings"] == settings[row] and cell["seed"] == 7 + image and cell["failed"] is None
        # with guidance off, looking at the score evaluates other rows beside it
        assert close(decoded(cell["picture"]), alone[row].pictures[image]) <= (ROUNDING if row == 1 else 0)
        assert cell["rows"] == alone[row].number("rows", image)
    plain = answer["images"][:2]
    assert plain[1]["similarity"] == pytest.approx(1, abs=1e-4) and plain[0]["similarity"] < 0.999
    scored = score(studio, prompt=PROMPT, seeds=[7, 8])["images"]
    assert [cell["score"] for cell in plain] == pytest.approx([image["score"] for image in scored], rel=1e-3)
    # another prompt is another score
    assert answer["images"][4]["score"] != pytest.approx(plain[0]["score"], rel=1e-3)

    grid = decoded(answer["grid"])
    assert grid.shape[0] >= 3 * 64 and grid.shape[1] >= 2 * 64
    # every picture is in the grid, at the same distances
    places = [placed(grid, decoded(cell["picture"])) for cell in answer["images"]]
    assert len({y for y, _ in places}) == 3 and len({x for _, x in places}) == 2


def placed(grid: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    height, width = picture.shape[:2]
    rows, columns = np.nonzero((grid == picture[0, 0]).all(2))
    for y, x in zip(rows.tolist(), columns.tolist()):
        if np.array_equal(grid[y : y + height, x : x + width], picture):
            return y, x
    raise AssertionError("the picture is not in the grid")


def test_every_method_by_its_preset(studio: Studio) -> None:
    answer = compare(studio, methods=list(METHODS), seeds=[7], steps=4)
    assert [cell["method"] for cell in answer["images"]] == list(METHODS)
    assert all(cell["failed"] is None and cell["score"] > 0 and cell["similarity"] is None for cell in answer["images"])


def test_rows_are_the_methods_own(studio: Studio) -> None:
    """Looking at the score costs nothing that is told, nor is anything traced beside it."""
    methods: list[dict[str, Any]] = [
        {"method": "none"},
        {"method": "static"},
        {"method": "batch_wise"},
        {"method": "dynamic", "latest": 500},
        {"method": "opposite_guidance"},
        {"method": "static", "tau": 500, "trace": "on"},
        {"method": "batch_wise", "trace": "compare"},
    ]
    for sampler in ("DDIM", "Euler"):
        answer = compare(studio, methods=methods, seeds=[7], steps=20, sampler_name=sampler, negative_prompt="blurry")
        for cell in answer["images"]:
            settings = {name: value for name, value in cell["settings"].items() if name != "trace"}
            alone = studio.run(settings, steps=20, sampler_name=sampler, negative_prompt="blurry")
            assert cell["rows"] == alone.number("rows"), settings
            assert cell["score"] > 0
    rows = [cell["rows"] for cell in compare(studio, methods=methods[:3], seeds=[7], steps=20)["images"]]
    assert rows == [38, 33, 44]


def test_a_method_that_fails_costs_its_own_row_alone(studio: Studio) -> None:
    if studio.is_real:
        pytest.skip("the tiny checkpoints all pad with the end token")
    studio.host.load("sd2-v")
    answer = compare(studio, methods=["none", {"method": "padding_fix", "fail_instead": True}, "padding_fix"])
    failed = [cell["failed"] for cell in answer["images"]]
    assert failed[:2] == [None, None] and all("pads with token 0 already" in text for text in failed[2:])
    pictures = [cell["picture"] for cell in answer["images"]]
    assert pictures[2:4] == [None, None]
    assert close(decoded(pictures[0]), decoded(pictures[4])) <= ROUNDING  # unmitigated, and it says so


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"methods": ["magic"]}, 'method = "magic" is not valid'),
        ({"methods": []}, "methods = [] is not valid; it must be a list of names or of dicts of settings"),
        ({"methods": "none"}, 'methods = "none" is not valid; it must be a list of names or of dicts of settings'),
        ({"methods": ["none", 3]}, "methods[1] = 3 is not valid; it must be a name or a dict of settings."),
        ({"methods": ["none", {"enabled": False}]}, "enabled = false in methods[1] is not valid"),
        ({"methods": ["None"]}, 'method = "None" is not valid (did you mean "none"?)'),
        ({"method": ["none"]}, 'there is no "method" in a comparison (did you mean "methods"?); it may have prompt'),
        ({"words": True}, 'there is no "words" in a comparison'),
        (
            {"methods": [{"method": "static", "gamma": 1}]},
            "gamma = 1 belongs to the methods batch_wise and per_sample",
        ),
        ({"prompt": ["a", "b"]}, 'prompt = ["a", "b"] is not valid; a comparison takes one prompt.'),
        ({"reference": "no picture"}, "reference is not valid"),
        ({"seeds": list(range(40))}, "160 images are too many"),
        ({"tau": 3}, 'there is no "tau" in a comparison; it may have'),
        ({"steps": 0}, "steps = 0 is not valid"),
    ],
)
def test_bad_requests(studio: Studio, body: dict[str, Any], words: str) -> None:
    status, answer = post(studio, "compare", {**SMALL, "prompt": PROMPT, "seeds": [7], **body})
    assert status == 422 and words in answer["detail"], answer


def file_of(picture: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says that it is this large."""
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


PATTERN = Image.effect_noise((96, 64), 80).convert("RGB")
BAD_PICTURES = {
    "truncated": (file_of(PATTERN, "PNG")[:-200], "is damaged"),
    "truncated JPEG": (file_of(PATTERN, "JPEG")[:-900], "is damaged"),
    "large": (declared(50_000, 50_000), "is too large; it may have 64 million pixels"),
    "rather large": (declared(9_000, 9_000), "is too large; it may have 64 million pixels"),
    "without content": (declared(64, 64), "is damaged"),
    "EPS": (file_of(PATTERN, "EPS"), "must be a PNG, JPEG or WebP picture"),
    "GIF": (file_of(PATTERN, "GIF"), "must be a PNG, JPEG or WebP picture"),
    "TIFF": (file_of(PATTERN, "TIFF"), "must be a PNG, JPEG or WebP picture"),
    "nothing": (b"", "must be a PNG, JPEG or WebP picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_reference_that_is_no_picture_is_refused_before_anything_is_made(studio: Studio, name: str) -> None:
    content, words = BAD_PICTURES[name]
    calls = None if studio.is_real else list(studio.host.calls)
    body = {**SMALL, "prompt": PROMPT, "methods": ["none"], "reference": base64.b64encode(content).decode()}
    status, answer = post(studio, "compare", body)
    assert status == 422 and words in answer["detail"], answer
    assert answer["detail"].startswith("memnoise: reference ")
    assert calls is None or studio.host.calls == calls


NO_PICTURES = {
    "number": 3,
    "true": True,
    "list": [],
    "mask": {"image": ""},
    "words": "no picture",
    "surrogate": "data:image/png;base64,\ud800",
    "many bytes": "A" * 45_000_000,
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_a_reference_that_is_no_text_of_a_picture_is_refused(studio: Studio, name: str) -> None:
    content = json.dumps({**SMALL, "prompt": PROMPT, "methods": ["none"], "reference": NO_PICTURES[name]})
    answer = studio.host.post("/memnoise/v1/compare", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "memnoise: reference " in answer.json()["detail"]
    assert len(answer.text) < 1000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_that_may_be_a_reference(studio: Studio, kind: str) -> None:
    made = Image.fromarray(studio.run({"method": "none"}).pictures[0])
    turned = made.rotate(90).copy()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    for picture, how in (
        (made, {}),
        (made.convert("RGBA"), {}) if kind != "JPEG" else (made.convert("CMYK"), {}),
        (turned, {"exif": exif}),
    ):
        content = base64.b64encode(file_of(picture, kind, quality=100, **how)).decode()
        (cell,) = compare(studio, methods=["none"], seeds=[7], reference=f"data:image/{kind.lower()};base64,{content}")[
            "images"
        ]
        assert cell["similarity"] == pytest.approx(1, abs=1e-2), (picture, how)


def test_sixteen_bits_of_grey_are_a_reference(studio: Studio) -> None:
    made = np.asarray(Image.fromarray(studio.run({"method": "none"}).pictures[0]).convert("L"))
    grey, deep = (encoded(made), file_of(Image.fromarray(made.astype(np.uint16) * 257), "PNG"))
    found = [
        compare(studio, methods=["none"], seeds=[7], reference=reference)["images"][0]["similarity"]
        for reference in (grey, base64.b64encode(deep).decode())
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    white = encoded(np.full_like(made, 255))  # which the lower bits alone nearly are
    assert compare(studio, methods=["none"], seeds=[7], reference=white)["images"][0]["similarity"] != found[0]


def test_it_can_be_interrupted(studio: Studio) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(post(studio, "compare", {**SMALL, "prompt": PROMPT, "methods": ["none"] * 60, "seeds": [7]}))

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        studio.host.post("/sdapi/v1/interrupt")
        asking.join(0.5)
    status, answer = answers[0]
    assert (status, answer.get("detail")) == (409, "memnoise: interrupted.") or (
        answer["stopped"] and len(answer["images"]) < 60
    )
    assert studio.run().pictures[0].std() > 0


def test_it_stops_after_the_picture_at_hand(studio: Studio) -> None:
    """The page's Interrupt, with the host's default options, asks to stop once the picture at hand is finished."""
    if studio.is_real:
        pytest.skip("its API has no such interrupt; see test_page")
    from modules import shared

    answers: list[Any] = []
    body = {**SMALL, "prompt": PROMPT, "methods": ["batch_wise"] * 60, "seeds": [7]}
    asking = threading.Thread(target=lambda: answers.append(post(studio, "compare", body)))
    asking.start()
    while asking.is_alive() and shared.state.job_no < 2:
        asking.join(0.01)
    while asking.is_alive():
        shared.state.stop_generating()
        asking.join(0.05)
    status, answer = answers[0]
    assert status == 200 and answer["stopped"] and 2 <= len(answer["images"]) < 60
    # what there is, is whole: the picture at hand was mitigated and sampled to its end
    assert len({cell["picture"] for cell in answer["images"]}) == 1 and answer["images"][0]["picture"]
    assert len({cell["rows"] for cell in answer["images"]}) == 1 and answer["images"][0]["rows"] > 0
