"""The generators of images: a WebUI with memnoise, or the miniature."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from lib_memnoise import __version__
from lib_memnoise.lab.client import NoAnswer, NotNow, NotThere, WebUI
from lib_memnoise.lab.evaluation.dispatch import Refused, Unanswered
from lib_memnoise.lab.evaluation.plan import Request
from lib_memnoise.lab.evaluation.run import GeneratedImage, Record, packed
from lib_memnoise.lab.miniature import OneSentence
from lib_memnoise.settings import INFOTEXT

_PARAMETER = re.compile(r'\s*([\w /-]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
"""A value of the infotext's last line, as the WebUI writes and reads it."""


def parameters(infotext: str) -> dict[str, str]:
    """The values of an infotext's last line, by name."""
    found = {}
    for name, value in _PARAMETER.findall(infotext.rsplit("\n", 1)[-1]):
        if value.startswith('"') and value.endswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                value = value[1:-1]
        found[name.strip()] = value.strip()
    return found


def literal(caption: str) -> str:
    """A caption as a WebUI's prompt: what means something in its syntax is escaped, or spelled in a way that the text
    encoder, which reads lower case and splits at punctuation, does not tell from it."""
    text = re.sub(r"\b(AND|BREAK)\b", lambda found: found[0].lower(), caption)
    text = re.sub(r"<(?=\w+:[^>]*>)", "< ", text)
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


@dataclass
class WebUIGenerator:
    """A running WebUI. Its own settings hold where the plan says nothing."""

    url: str
    auth: str | None = None
    seconds: float = 1800.0
    """How long one request may take."""
    _client: WebUI = field(init=False)
    _source: dict[str, Any] | None = field(default=None, init=False)
    _known: set[tuple[str, str]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._client = WebUI(self.url, self.auth, patience=self.seconds)

    in_process = False

    @property
    def name(self) -> str:
        return self._client.url

    def source(self) -> dict[str, Any]:
        """The checkpoint that it has loaded, and its memnoise.

        Raises:
            OneSentence: it is no WebUI, has no memnoise, or another version. Unanswered: try again.
        """
        about = self._answered(lambda: self._client.get("about"))
        if not isinstance(about, dict) or about.get("memnoise") != __version__:
            has = about.get("memnoise") if isinstance(about, dict) else None
            raise OneSentence(f"{self.name} has memnoise {has or 'of another version'}; this is {__version__}.")
        found = {name: about.get(name) for name in ("memnoise", "checkpoint", "hash", "parameterization", "dtype")}
        self._source = {**found, "device": about.get("device")}
        return found

    def _has(self, request: Request) -> None:
        """That it has the sampler and schedule type: instead of names that it does not know it takes others."""
        for path, kind, wanted in (
            ("samplers", "sampler", request.sampler),
            ("schedulers", "schedule type", request.scheduler),
        ):
            if not wanted or (kind, wanted) in self._known:
                continue
            found = self._answered(lambda path=path: self._client.call("GET", f"/sdapi/v1/{path}", None))
            names = [str(each.get("label") or each["name"]) for each in found]
            others = [name for each in found for name in (each["name"], *(each["aliases"] or []))]
            if wanted not in (*names, *others):
                raise OneSentence(f"{self.name} has no {kind} {wanted!r}; it has {', '.join(names)}.")
            self._known.add((kind, wanted))

    def __call__(self, request: Request) -> list[GeneratedImage]:
        self._has(request)
        settings = request.settings
        payload: dict[str, Any] = {
            "prompt": literal(request.caption),
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "batch_size": request.count,
            "n_iter": 1,
            "steps": request.steps,
            "cfg_scale": request.cfg,
            "width": request.width,
            "height": request.height,
            "sampler_name": request.sampler,
            "save_images": False,
            "override_settings": {**request.options},
            "alwayson_scripts": {"memnoise": {"args": [settings is not None, dict(settings or {})]}},
        }
        if request.scheduler:
            payload["scheduler"] = request.scheduler
        begin = time.perf_counter()
        answer = self._answered(lambda: self._client.call("POST", "/sdapi/v1/txt2img", payload))
        seconds = (time.perf_counter() - begin) / request.count
        memory = self._memory()
        try:
            info = json.loads(answer["info"])
            pictures = [_opened(text) for text in answer["images"]][-request.count :]
            texts = [parameters(text) for text in info["infotexts"]][-request.count :]
            if not len(pictures) == len(texts) == request.count:
                raise ValueError(f"{len(pictures)} pictures instead of {request.count}")
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise Refused(f"{self.name} answered with no pictures that can be read ({error}).") from None
        self._check(info, texts, request)
        traces = self._traces(texts, request)
        return [
            _image(picture, text, request.seed + k, seconds, memory, traces[k])
            for k, (picture, text) in enumerate(zip(pictures, texts))
        ]

    def _answered(self, ask: Any) -> Any:
        try:
            return ask()
        except NoAnswer as error:
            raise Unanswered(str(error)) from None
        except NotNow as error:
            raise Refused(str(error)) from None
        except NotThere:
            if self._source is None:
                raise
            # It was there: a WebUI that starts listens before its paths are complete.
            raise Unanswered(f"{self.name} is not ready.") from None

    def _check(self, info: Mapping[str, Any], texts: list[dict[str, str]], request: Request) -> None:
        """That the answer is of the run's checkpoint, and was made with memnoise where that was asked for."""
        assert self._source is not None, "asked for images before its source"
        for name, key in (("sd_model_name", "checkpoint"), ("sd_model_hash", "hash")):
            found, wanted = info.get(name), self._source[key]
            if found and wanted and found != wanted:
                raise OneSentence(f"{self.name} has another checkpoint than before ({found} instead of {wanted}).")
        if request.settings is not None and not all(INFOTEXT in text for text in texts):
            raise OneSentence(f"{self.name} answered without a word of memnoise; is another script in its way?")

    def _memory(self) -> float | None:
        """Peak of the GPU's memory since it was last asked for, in bytes; None without a GPU."""
        assert self._source is not None, "asked for images before its source"
        if not str(self._source["device"]).startswith("cuda"):
            return None
        found = self._answered(lambda: self._client.post("peak_memory", {}))["bytes"]
        return None if found is None else float(found)

    def _traces(self, texts: list[dict[str, str]], request: Request) -> list[list[list[float]]]:
        name = texts[0].get(f"{INFOTEXT} trace id")
        if name is None:
            return [[] for _ in texts]
        images = self._answered(lambda: self._client.get(f"trace/{name}"))["images"]
        return [[[point["t"], point["magnitude"]] for point in image["points"]] for image in images]


def _opened(text: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(text.rsplit(",", 1)[-1], validate=True)))
        picture.load()
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    return picture


def _image(
    picture: Image.Image,
    text: Mapping[str, str],
    seed: int,
    seconds: float,
    memory: float | None,
    trace: list[list[float]],
) -> GeneratedImage:
    def number(key: str) -> float | None:
        value = text.get(f"{INFOTEXT} {key}")
        return None if value is None else float(value)

    record = Record(
        seed=seed,
        rows=number("rows"),
        backward_rows=number("backward rows"),
        before=number("magnitude"),
        after=number("magnitude after"),
        norm=number("norm"),
        seconds=seconds,
        memory=memory,
        failed=text.get(f"{INFOTEXT} failed"),
        notes=[text[f"{INFOTEXT} note"]] if f"{INFOTEXT} note" in text else [],
        trace=trace,
    )
    return GeneratedImage(packed(picture, record), record)


class MiniatureGenerator:
    """The miniature, in this process."""

    name = "the miniature"
    in_process = True

    def __init__(self, variant: str = "eps") -> None:
        from lib_memnoise.lab.miniature.model import load_miniature

        self._model = load_miniature(variant)

    def source(self) -> dict[str, Any]:
        """The miniature's weights, by their checksum."""
        from lib_memnoise.lab.miniature.checkpoint import manifest

        variant = self._model.parameterization
        return {
            "memnoise": __version__,
            "checkpoint": f"the miniature, {variant}",
            "hash": manifest()["sha256"][variant][:10],
            "parameterization": variant,
            "dtype": "float32",
        }

    def __call__(self, request: Request) -> list[GeneratedImage]:
        from lib_memnoise.lab.miniature.model import to_images
        from lib_memnoise.lab.samplers import SAMPLERS
        from lib_memnoise.lab.simulator import generate, noises
        from lib_memnoise.settings import Settings, from_mapping

        if request.sampler not in SAMPLERS:
            raise OneSentence(f"the miniature has no sampler {request.sampler!r}; it has {', '.join(SAMPLERS)}.")
        if (request.width, request.height) != (128, 128) or request.negative_prompt or request.options:
            raise OneSentence("the miniature makes pictures of 128x128, without negative prompt and options.")
        settings = Settings()
        if request.settings is not None:
            settings = from_mapping({"enabled": True, **request.settings})
            if settings.is_by_score:
                raise OneSentence("the miniature has no calibration; when = flagged needs a threshold here.")
        seeds = [request.seed + k for k in range(request.count)]
        begin = time.perf_counter()
        found = generate(
            self._model,
            [request.caption] * request.count,
            noises(seeds),
            settings,
            cfg=request.cfg,
            seeds=seeds,
            sampler=request.sampler,
            steps=request.steps,
            looking=settings.trace != "off",
        )
        pictures = to_images(self._model.decode(found.latents))
        seconds = (time.perf_counter() - begin) / request.count
        length = found.noise.flatten(1).norm(dim=1) / found.noise[0].numel() ** 0.5
        made = []
        for k, picture in enumerate(pictures):
            record = Record(
                seed=seeds[k],
                rows=float(found.forward[k]),
                backward_rows=float(found.backward[k]),
                before=float(found.before[k]),
                after=float(found.after[k]),
                norm=float(length[k]),
                seconds=seconds,
                trace=[[t, float(size[k])] for t, size in found.trace],
            )
            made.append(GeneratedImage(packed(Image.fromarray(picture), record), record))
        return made
