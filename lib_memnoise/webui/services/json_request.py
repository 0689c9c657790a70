"""Validates the JSON of a request for a score, a calibration or a comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from modules import sd_samplers, shared

from lib_memnoise.errors import echo, is_encodable, meant
from lib_memnoise.webui import quirks

MOST_IMAGES = 256
MOST_CHARACTERS = 10_000
"""The most characters of a text. A prompt is encoded 75 tokens at a time, each with a run of the text encoder."""
MOST_NESTED, MOST_SQUARE = 50, 100
"""The most brackets within one another, and the most square brackets. The host parses them by recursion, in a time that
grows with the square of their number, and its queue waits meanwhile."""
MOST_SEED = 2**32 - 1


class BadRequest(ValueError):
    """A request is not valid; the message is one sentence."""


@dataclass(frozen=True)
class Request:
    """The images to score or generate: every prompt with every seed."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    seeds: tuple[int, ...] = (-1,)
    width: int = 512
    height: int = 512
    sampler_name: str = "DDIM"
    scheduler: str = "Automatic"
    steps: int = 50
    cfg_scale: float = 7.0
    styles: tuple[str, ...] = ()
    words: bool = False


SINGULAR = {"prompt": "prompts", "seed": "seeds"}
LABELS = {
    "prompt": "Prompt", "prompts": "Prompts", "negative_prompt": "Negative prompt", "seed": "Seed", "seeds": "Seeds",
    "width": "Width", "height": "Height", "sampler_name": "Sampling method", "scheduler": "Schedule type",
    "steps": "Sampling steps", "cfg_scale": "CFG scale", "styles": "Styles", "words": "Words",
    "methods": "Methods", "reference": "Reference",
}  # fmt: skip
"""The names that a request may have, and their labels on the page."""
OWN = ("methods", "reference")
"""Names that only a comparison has; it reads them itself."""


def parse(
    body: Any, *, kind: str = "score", without: Collection[str] = OWN, others: Mapping[str, str] | None = None
) -> Request:
    """Validate a request from JSON.

    `prompt` (or `prompts`) is a string or a list of strings; `seed` (or `seeds`) is a number or a list of numbers. All
    other names are the fields of `Request`.

    Args:
        kind: the kind of request, in a word, for error messages.
        without: names that this kind of request does not take.
        others: names that it takes besides and that its caller has read already, with their labels.

    Raises:
        BadRequest: something is missing, unknown, given twice or out of bounds.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"memnoise: the body = {echo(body)} is not valid; it must be a JSON object.")
    known = {name: label for name, label in LABELS.items() if name not in without}
    for name in body:
        if name not in known:
            known |= others or {}
            hint = meant(name, known)
            raise BadRequest(f"memnoise: there is no {echo(name)} in a {kind}{hint}; it may have {', '.join(known)}.")
    for one, many in SINGULAR.items():
        if one in body and many in body:
            raise BadRequest(f"memnoise: {one} and {many} are both given; a {kind} takes one of them.")
    if "prompt" not in body and "prompts" not in body:
        raise BadRequest("memnoise: the prompt is missing; prompt must be a text or a list of texts.")
    given: dict[str, Any] = {}
    for name, value in body.items():
        if name not in OWN:
            field = SINGULAR.get(str(name), str(name))
            given[field] = READERS[field](name, value)
    request = Request(**given)
    # This WebUI may lack the default sampler or schedule type.
    for name in ("sampler_name", "scheduler"):
        READERS[name](name, getattr(request, name))
    count = len(request.prompts) * len(request.seeds)
    if count > MOST_IMAGES:
        raise BadRequest(f"memnoise: {count} images are too many for one {kind}; it may have {MOST_IMAGES}.")
    return request


def need(ok: bool, name: str, value: Any, rule: str, known: Mapping[str, str] | None = None) -> None:
    """Raise `BadRequest` unless `ok`.

    Args:
        rule: what the value must be, as the end of the sentence.
        known: the valid values and their labels, where they can be listed.
    """
    if not ok:
        hint = meant(value, known or {})
        raise BadRequest(f"memnoise: {name} = {echo(value)} is not valid{hint}; it must be {rule}.")


def read_text(name: str, value: Any, rule: str = "a text") -> str:
    need(isinstance(value, str), name, value, rule)
    need(is_encodable(value), name, value, "a text that can be encoded, without unpaired surrogates")
    if len(value) > MOST_CHARACTERS:
        raise BadRequest(f"memnoise: {name} has {len(value)} characters; it may have {MOST_CHARACTERS}.")
    return str(value)


def prompt(name: str, value: Any, rule: str = "a text") -> str:
    """A text that the host can parse in reasonable time."""
    checked = read_text(name, value, rule)
    depth = nested = 0
    plain = re.sub(r"\\.", "", checked)
    for bracket in re.findall(r"[][()]", plain):
        depth = max(depth + (1 if bracket in "([" else -1), 0)
        nested = max(nested, depth)
    if nested > MOST_NESTED:
        raise BadRequest(f"memnoise: {name} has {nested} brackets within one another; it may have {MOST_NESTED}.")
    if plain.count("[") > MOST_SQUARE:
        raise BadRequest(f"memnoise: {name} has {plain.count('[')} square brackets; it may have {MOST_SQUARE}.")
    return checked


def prompts(name: str, value: Any) -> tuple[str, ...]:
    rule = "a text or a list of texts"
    need(value not in ([], ()), name, value, f"{rule}, at least one")
    texts = tuple(prompt(name, one, rule) for one in as_list(value))
    need(all(one.strip() for one in texts), name, value, f"{rule} that are not empty: an empty prompt has no score")
    return texts


def as_list(value: Any) -> list[Any]:
    """A list as it is, and anything else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number from low to high. 512.0 is one, since the page's sliders send it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high and value == int(value)


def seeds(name: str, value: Any) -> tuple[int, ...]:
    rule = f"a whole number from -1 (a random one) to {MOST_SEED}, or a list of them"
    need(value not in ([], ()) and all(whole(one, -1, MOST_SEED) for one in as_list(value)), name, value, rule)
    return tuple(int(one) for one in as_list(value))


def size(name: str, value: Any) -> int:
    need(whole(value, 64, 2048) and value % 8 == 0, name, value, "a multiple of 8 from 64 to 2048")
    return int(value)


def steps(name: str, value: Any) -> int:
    need(whole(value, 1, 150), name, value, "a whole number from 1 to 150")
    return int(value)


def cfg_scale(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    rule = "a number above 1, for there is no guidance otherwise, and at most 100"
    need(number and 1 < value <= 100, name, value, rule)
    return float(value)


def sampler_name(name: str, value: Any) -> str:
    # The host's `visible_samplers()` is the same, but Forge Classic does not have it.
    visible = [one.name for one in sd_samplers.samplers if one.name not in sd_samplers.samplers_hidden]
    return one_of(name, value, {one: one for one in visible})


def scheduler(name: str, value: Any) -> str:
    """A schedule type by its name or label; any text where the host has no list of them."""
    if quirks.has("schedules are in sampler names"):
        return read_text(name, value)
    from modules.sd_schedulers import schedulers

    if isinstance(value, str) and value in {one.name for one in schedulers}:
        return value
    return one_of(name, value, {one.label: one.name for one in schedulers})


def styles(name: str, value: Any) -> tuple[str, ...]:
    """Names of the host's saved styles. Others are refused, since the host would ignore them."""
    names = tuple(read_text(name, one, "a text or a list of texts") for one in as_list(value))
    saved = getattr(getattr(shared, "prompt_styles", None), "styles", None)
    if saved is None:
        return names
    for one in names:
        if saved:
            one_of(name, one, {style: style for style in saved})
        else:
            need(False, name, one, "empty, for no styles are saved in this WebUI")
    return names


def one_of(name: str, value: Any, known: Mapping[str, str]) -> str:
    need(isinstance(value, str) and value in known, name, value, f"one of {', '.join(known)}", known)
    return str(value)


def words(name: str, value: Any) -> bool:
    need(isinstance(value, bool), name, value, "true or false")
    return bool(value)


READERS: dict[str, Callable[[str, Any], Any]] = {
    "prompts": prompts,
    "negative_prompt": prompt,
    "seeds": seeds,
    "width": size,
    "height": size,
    "sampler_name": sampler_name,
    "scheduler": scheduler,
    "steps": steps,
    "cfg_scale": cfg_scale,
    "styles": styles,
    "words": words,
}
"""For each field of `Request`, the function that validates a value. Its first argument is the name as it was given."""
