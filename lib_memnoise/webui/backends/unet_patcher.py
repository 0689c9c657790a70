"""Hosts that patch a U-Net (Forge, reForge): `forge_objects.unet` takes sigmas and gives denoised latents.

They generate in inference mode, give each pass a U-Net with patches of its own, and evaluate a prompt's parts and the
unconditional rows as chunks of one row an image.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from modules import shared
from torch import Tensor, nn

from lib_memnoise.core.delta import per_image
from lib_memnoise.sampling.cond_rows import Cond
from lib_memnoise.sampling.guider import Gate, Step
from lib_memnoise.sampling.output_cache import Handover
from lib_memnoise.torch_utils.inference_tensors import normal_tensors
from lib_memnoise.torch_utils.out_of_place import out_of_place
from lib_memnoise.torch_utils.patching import original
from lib_memnoise.webui import tokens
from lib_memnoise.webui.backends.backend import Composition, Conditions, Evaluated
from lib_memnoise.webui.failures import Unsupported
from lib_memnoise.webui.sampler_start import FirstStep, in_sigmas, in_timesteps

WRAPPER = "model_function_wrapper"
"""The U-Net's option: a function that stands in front of the network."""
BESIDE = ("transformer_options", "control", "control_model")
"""What the network is given beside conditions."""
COND, UNCOND = 0, 1
"""How the host marks chunks of rows."""
ELSEWHERE = 1 << 30
"""Number of a row that is none of the step's own."""


@dataclass(frozen=True)
class Host:
    """The host's own functions, by what they do."""

    evaluate: Callable[..., Any]
    prepare: Callable[..., Any]
    compile: Callable[..., Any]
    compile_weighted: Callable[..., Any]
    condition: Callable[..., Any]
    hands_floor: bool
    """NGMS's sigma is handed to the sampler, and odd steps go without; else it is an option, and even ones do."""


@functools.cache
def host() -> Host:
    def has(*names: str) -> list[Any]:
        return [importlib.import_module(name) for name in names]

    with contextlib.suppress(ImportError):
        sampling, condition = has("backend.sampling.sampling_function", "backend.sampling.condition")
        return Host(
            sampling.calc_cond_uncond_batch,
            sampling.sampling_prepare,
            condition.compile_conditions,
            condition.compile_weighted_conditions,
            condition.Condition,
            hands_floor=True,
        )
    samplers, conds, sampler = has(
        "ldm_patched.modules.samplers", "ldm_patched.modules.conds", "modules_forge.forge_sampler"
    )
    return Host(
        samplers.calc_cond_uncond_batch,
        sampler.sampling_prepare,
        sampler.cond_from_a1111_to_patched_ldm,
        sampler.cond_from_a1111_to_patched_ldm_weighted,
        conds.CONDRegular,
        hands_floor=False,
    )


def patcher() -> Any:
    """The U-Net with the patches of the pass at hand."""
    return shared.sd_model.forge_objects.unet


def scaling(model: Any) -> Any:
    """What converts between the network's inputs and outputs and the sampler's latents."""
    return model.predictor if hasattr(model, "predictor") else model.model_sampling


def gain(model: Any, sigma: Tensor) -> float:
    """∂(denoised)/∂(native output) at a sigma `(1,)`: denoised latents are linear in the native output."""
    one = torch.ones(1, 1, 1, 1, device=sigma.device)
    return float(scaling(model).calculate_denoised(sigma, one, torch.zeros_like(one)))


def as_heard(parts: Composition) -> Composition:
    """The host pairs the k-th parts of all images: as many as the shortest prompt has, weighted as the last one's."""
    count = min(len(own) for own in parts)
    return [[(row, weight) for (row, _), (_, weight) in zip(own[:count], parts[-1])] for own in parts]


def which_part(crossattn: Tensor, cond: Cond, rows_of_part: Sequence[list[int]]) -> int | None:
    """Which part of the prompts a chunk of rows is. Of equal ones any will do."""
    every = tokens.vectors(cond)
    length = every.shape[1]
    for k, rows in enumerate(rows_of_part):
        expected = every[rows].to(crossattn)
        if crossattn.shape[0] == len(rows) and torch.equal(crossattn[:, :length], expected):
            return k
    return None


def contents(c: Mapping[str, Any]) -> Conditions:
    """The conditions among what the network is given."""
    return {key: value for key, value in c.items() if key not in BESIDE}


def nested(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor in nested lists and dicts changed; the lists and dicts are new, for the network empties them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: nested(entry, function) for key, entry in value.items()}
    return [nested(entry, function) for entry in value] if isinstance(value, list) else value


def marks_of(c: Mapping[str, Any], rows: int) -> list[int]:
    """COND or UNCOND of each row."""
    chunks = c["transformer_options"]["cond_or_uncond"]
    return [mark for mark in chunks for _ in range(rows // len(chunks))]


def some_rows(c: Mapping[str, Any], rows: Sequence[int], marks: Sequence[int] | None = None) -> dict[str, Any]:
    """What the network is given for some rows, each a chunk of its own; `marks` instead of those they have."""
    count = c["c_crossattn"].shape[0]

    def take(value: Tensor) -> Tensor:
        return value[list(rows)] if value.ndim and value.shape[0] == count else value

    selected = {key: nested(value, take) for key, value in c.items() if key != "transformer_options"}
    if marks is None:
        every = marks_of(c, count)
        marks = [every[row] for row in rows]
    options = dict(c["transformer_options"])
    options["cond_or_uncond"] = list(marks)
    options["sigmas"] = options["sigmas"][:1]
    if "cond_mark" in options:
        options["cond_mark"] = options["cond_mark"].new_tensor([float(mark) for mark in marks])
        options["cond_indices"] = [k for k, mark in enumerate(marks) if mark == COND]
        options["uncond_indices"] = [k for k, mark in enumerate(marks) if mark != COND]
    if "uuids" in options:
        chunk = count // len(options["uuids"])
        options["uuids"] = [options["uuids"][row // chunk] for row in rows]
    return {**selected, "transformer_options": options}


def fingerprint(value: Any) -> Any:
    """Of a U-Net's options: equal for equal ones, and memnoise's own gate left out."""
    if isinstance(value, Mapping):
        found = []
        for key, entry in value.items():
            if key == WRAPPER and hasattr(entry, "memnoise_inner"):
                entry = entry.memnoise_inner
            if entry is not None:
                found.append((key, fingerprint(entry)))
        return tuple(found)
    if isinstance(value, (list, tuple)):
        return tuple(fingerprint(entry) for entry in value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def without_token_merging(options: Any) -> Any:
    """A U-Net's options without what merges tokens, whose gradient is wrong."""
    if isinstance(options, Mapping):
        return {key: without_token_merging(value) for key, value in options.items()}
    if isinstance(options, list):
        return [value for value in options if not str(getattr(value, "__module__", "")).endswith("tomesd")]
    return options


def options_of(unet: Any) -> dict[str, Any]:
    """The options to evaluate a U-Net with."""
    options: dict[str, Any] = unet.model_options
    return without_token_merging(options) if torch.is_grad_enabled() else dict(options)


@dataclass(frozen=True)
class Call:
    """One call of the network."""

    c: Conditions
    marks: list[int]
    out: Tensor


def call_behind(
    inner: Callable[..., Tensor] | None, apply_model: Callable[..., Tensor], args: dict[str, Any]
) -> Tensor:
    """What a wrapper of the network stands before: another one, or the network."""
    return apply_model(args["input"], args["timestep"], **args["c"]) if inner is None else inner(apply_model, args)


def recording(options: dict[str, Any]) -> tuple[dict[str, Any], list[Call]]:
    """Options with which every call of the network is noted."""
    calls: list[Call] = []
    inner = options.get(WRAPPER)

    def record(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        out = call_behind(inner, apply_model, args)
        calls.append(Call(contents(args["c"]), list(args["cond_or_uncond"]), out))
        return out

    return {**options, WRAPPER: record}, calls


class Patched:
    """See `backends.backend.Network`."""

    @property
    def unet(self) -> nn.Module:
        unet: nn.Module = patcher().model.diffusion_model
        return unet

    @property
    def kind(self) -> str:
        scale, one = scaling(patcher().model), torch.ones(1, 1, 1, 1)
        sigma = torch.ones(1)
        if float(scale.calculate_input(sigma, one)) == 1:
            return "flow"
        kept = float(scale.calculate_denoised(sigma, torch.zeros_like(one), one))
        return "eps" if kept == 1 else "v"

    def alpha_bar(self, t: float) -> float:
        return float(1 / (1 + scaling(patcher().model).sigmas[round(t)] ** 2))

    def load(self, x: Tensor) -> None:
        host().prepare(patcher(), x)

    def first_step(self, p: Any, sampler: Any, x: Tensor) -> FirstStep:
        c_in: float | Tensor = 1.0
        if hasattr(sampler, "get_timesteps"):
            # The host's denoiser looks the sigma up, and scales what these samplers give it.
            alphas_cumprod = shared.sd_model.alphas_cumprod.to(x.device)
            t, scale, base = in_timesteps(p, sampler, x, alphas_cumprod)
            sigma = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)[round(t)].reshape(1)
            c_in = per_image((sigma**2.0 + 1.0) ** 0.5)
        else:
            sigma, scale, base = in_sigmas(p, sampler, x)
        timestep = scaling(patcher().model).timestep(sigma)
        return FirstStep(float(timestep), sigma, scale, c_in, base, sigma=float(sigma))

    def composition(self, parts: Composition) -> Composition:
        return as_heard(parts)

    def padded(self, denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
        """As they are: the host repeats the shorter one, which changes nothing but rounding."""
        return cond, uncond

    def first_calls(self, p: Any, rows: int, images: int, *, equal: bool, sigma: float) -> tuple[tuple[int, int], ...]:
        """The host chooses its calls itself."""
        return ()

    def evaluate(self, predictor: Any, inputs: Tensor, owners: list[int], cond: Cond) -> Evaluated:
        if predictor.unconditional is not None:
            (prompts, _) = self._asked(predictor, inputs, cond, None)
            return [prompts, (self._conditions(predictor, inputs), predictor.unconditional)]
        own = predictor.uncond if predictor.host_uncond is None else predictor.host_uncond
        prompts, others = self._asked(predictor, inputs, cond, own)
        if predictor.host_uncond is None:
            return [prompts, others]
        return [prompts, self._asked(predictor, inputs, None, predictor.uncond)[1], others]

    def unconditional(self, predictor: Any, inputs: Tensor) -> Tensor:
        return self._asked(predictor, inputs, None, predictor.uncond)[1][1]

    def _conditions(self, predictor: Any, inputs: Tensor) -> Conditions:
        """Of unconditional rows, as the network gets them."""
        found = host().compile(predictor.uncond)[0]
        self._complete([found], predictor, inputs)
        return {key: value.cond for key, value in found["model_conds"].items()}

    def _complete(self, conds: list[Any], predictor: Any, inputs: Tensor) -> None:
        """What the host's denoiser gives the network of the picture and of ControlNets."""
        unet = patcher()
        picture = predictor.image_cond
        if isinstance(unet.extra_concat_condition, Tensor):
            picture = unet.extra_concat_condition
            if picture.shape[0] > len(inputs):
                picture = picture[predictor.images]
        if picture.shape[0] == inputs.shape[0] and picture.shape[2:] == inputs.shape[2:]:
            for cond in conds:
                cond["model_conds"]["c_concat"] = host().condition(picture)
        if unet.controlnet_linked_list is not None:
            for cond in conds:
                cond["control"] = unet.controlnet_linked_list

    def _asked(self, predictor: Any, inputs: Tensor, cond: Cond, uncond: Cond) -> Evaluated:
        """The host's own evaluation of the prompts' rows and the unconditional ones; either may be None."""
        images = len(inputs)
        first = [sum(map(len, predictor.parts[:i])) for i in range(images)]
        composition = [
            [(first[i] + k, weight) for k, (_, weight) in enumerate(own)] for i, own in enumerate(predictor.parts)
        ]
        rows_of_part = [list(column) for column in zip(*[[row for row, _ in own] for own in composition])]
        conds = [] if cond is None else host().compile_weighted(cond, composition)
        unconds = None if uncond is None else host().compile(uncond)
        self._complete([*conds, *(unconds or [])], predictor, inputs)
        unet = patcher()
        options, calls = recording(options_of(unet))
        host().evaluate(unet.model, conds, unconds, inputs, predictor.step.at.repeat(images), options)

        count = 0 if cond is None else sum(map(len, predictor.parts))
        found: list[tuple[Conditions, Tensor]] = [({}, inputs[:1])] * (count + images)
        for call in calls:
            for chunk, mark in enumerate(call.marks):
                place = slice(chunk * images, (chunk + 1) * images)
                given = {key: value[place] for key, value in call.c.items() if isinstance(value, Tensor)}
                part = None if mark == UNCOND else which_part(given["c_crossattn"], cond, rows_of_part)
                rows = range(count, count + images) if mark == UNCOND else rows_of_part[part or 0]
                for k, row in enumerate(rows):
                    found[row] = {key: value[k : k + 1] for key, value in given.items()}, call.out[place][k : k + 1]

        def group(part: list[tuple[Conditions, Tensor]]) -> tuple[Conditions, Tensor]:
            shapes = {tuple(given["c_crossattn"].shape) for given, _ in part if given}
            # Of several lengths none is what the sampler will ask for.
            together = (
                {key: torch.cat([given[key] for given, _ in part]) for key in part[0][0]} if len(shapes) == 1 else {}
            )
            return together, torch.cat([out for _, out in part])

        return [group(part) if part else ({}, inputs[:0]) for part in (found[:count], found[count:])]

    def native(self, difference: Tensor, at: Tensor) -> Tensor:
        return difference / gain(patcher().model, at)

    def state(self) -> tuple[Any, ...]:
        unet = patcher()
        return (
            id(unet.model),
            unet.model.apply_model,
            original(unet.model.diffusion_model.forward),
            fingerprint(options_of(unet)),
            id(unet.controlnet_linked_list),
            id(unet.extra_concat_condition),
        )

    def is_patched(self) -> bool:
        """Here they are handed to the U-Net, with what it is given."""
        return False

    def is_doubtful(self) -> bool:
        return False

    def is_used(self) -> bool:
        return hasattr(patcher().model_options.get(WRAPPER), "memnoise_inner")

    @contextlib.contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        objects = shared.sd_model.forge_objects
        shared.sd_model.forge_objects = objects.shallow_copy()
        try:
            yield
        finally:
            shared.sd_model.forge_objects = objects

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Out of inference mode, with weights that are no inference tensors and nothing overwritten.

        Token merging is left out meanwhile (`options_of`).
        """
        model = patcher().model
        with torch.inference_mode(False), normal_tensors(model), out_of_place(model.diffusion_model):
            try:
                yield
            except RuntimeError as error:
                if "nference tensors cannot be saved" not in str(error):
                    raise
                raise Unsupported(
                    "this checkpoint's weights are kept in a form that has no gradient; use batch-wise"
                ) from error

    def gate(self, *args: Any, **kwargs: Any) -> PatchGate:
        return PatchGate(*args, **kwargs)


NETWORK = Patched()


def standing_before(gate: PatchGate, inner: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """What a U-Net's options take for a gate. It holds the gate weakly, as the pass's denoiser holds it.

    A host may keep a checkpoint, and with it the U-Net of its last pass, for as long as it runs: what belongs to a
    request must not hang on that. A plain function, since the host copies options deeply, and those it leaves alone.
    """
    weakly = weakref.ref(gate)

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        gate = weakly()
        return call_behind(inner, apply_model, args) if gate is None else gate.called(apply_model, args)

    wrapper.memnoise_inner = inner  # type: ignore[attr-defined]
    return wrapper


class PatchGate(Gate):
    """Stands in front of the pass's own copy of the U-Net, which the host drops with the next.

    It takes its place at the first step, when every extension has made its patches, and again where a refiner takes
    over.
    """

    _wrapper: Any = None
    _inner: Any = None
    _apply: Any = None
    _unet: Any = None

    def attach(self, denoiser: Any) -> None:
        objects = denoiser.inner_model.inner_model.forge_objects
        if self._wrapper is not None and objects.unet.model_options.get(WRAPPER) is self._wrapper:
            return

        unet = objects.unet.clone()
        self._inner = unet.model_options.get(WRAPPER)
        unet.model_options[WRAPPER] = self._wrapper = standing_before(self, self._inner)
        objects.unet = self._unet = unet
        self._handover = Handover(self, self.answers, compared=contents, selected=some_rows)

    def detach(self) -> None:
        self.retired = True

    def step_of(self, denoiser: Any, params: Any) -> Step:
        batch = denoiser.sampler.sampler_extra_args["cond"].batch
        heard = as_heard([[(k, part.weight) for k, part in enumerate(parts)] for parts in batch])
        weights = [[weight for _, weight in own] for own in heard]
        lengths = [len(parts) for parts in batch]
        # Rows of the texts that are each part.
        self._rows_of_part = [[sum(lengths[:i]) + k for i in range(len(batch))] for k in range(min(lengths))]
        self._params = params
        return Step(
            t=float(scaling(self._unet.model).timestep(params.sigma[:1])),
            weights=weights,
            known=params.x.shape[0] == len(weights),
            latents=params.x,
            scale=self._scale(denoiser, float(params.sigma[0])),
        )

    def _scale(self, denoiser: Any, sigma: float) -> float | None:
        """The CFG scale of a step, or None where the host leaves the unconditional rows out."""
        p, opts = self.p, shared.opts
        scale = float(p.hr_cfg if getattr(p, "is_hr_pass", False) and hasattr(p, "hr_cfg") else p.cfg_scale)
        early, progress = getattr(opts, "skip_early_cond", 0.0), denoiser.step / denoiser.total_steps
        every = getattr(opts, "s_min_uncond_all", False)
        if host().hands_floor:
            floor, turn = denoiser.sampler.sampler_extra_args.get("s_min_uncond") or 0.0, denoiser.step % 2
            skipped = early > 0 and progress <= early
        else:
            floor, turn = getattr(opts, "s_min_uncond", 0.0), denoiser.step % 2 == 0
            skipped = denoiser.step < early or (early != 0 and progress <= early)
        skipped = skipped or bool((turn or every) and floor > 0 and sigma < floor)
        alone = math.isclose(scale, 1.0) and not self._unet.model_options.get("disable_cfg1_optimization", False)
        return None if skipped or alone else scale

    def called(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """The network is asked for some chunks of the step's rows."""
        x, sigma, c, marks = args["input"], args["timestep"], args["c"], args["cond_or_uncond"]
        self._apply, step = apply_model, self.step
        if self.retired or step is None:
            return self.apply_model(x, sigma, c)
        images = len(step.weights)
        rows = [ELSEWHERE] * len(x)
        if len(x) == images * len(marks) and step.known:
            rows = []
            for chunk, mark in enumerate(marks):
                part = None
                if mark == COND:
                    crossattn = c["c_crossattn"][chunk * images : (chunk + 1) * images]
                    part = which_part(crossattn, self._params.text_cond, self._rows_of_part)
                for image in range(images):
                    own, last = self._rows_of(image)
                    rows.append(last if mark == UNCOND else own[part] if part is not None else ELSEWHERE)
        self._rows = rows
        self._c = c
        return self.answer(rows, x, sigma, c=c)

    def apply_model(self, x: Tensor, sigma: Tensor, c: dict[str, Any]) -> Tensor:
        """The network behind this gate."""
        if "control" in c:
            c = {**c, "control": nested(c["control"], lambda value: value)}
        if self._inner is None:
            out: Tensor = self._apply(x, sigma, **c)
            return out
        marks = c["transformer_options"]["cond_or_uncond"]
        out = self._inner(self._apply, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": marks})
        return out

    def evaluate(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        c = kwargs["c"] if "c" in kwargs else self._conditioned(**kwargs)
        self._handover.heard = self.heard_by(rows)
        try:
            out = self._handover.apply_model(x, sigma, c)
        finally:
            self._handover.heard = []
        self.count(rows, self._handover.known)
        return out, out.detach() / gain(self._unet.model, sigma[:1])

    def conditions(self, text: Cond, rows: list[int], *, unconditional: bool) -> dict[str, Any]:
        """What else the network is given is taken from the call under way."""
        assert self.step is not None
        owners = self.step.owners
        there = [owners[row] if row < len(owners) else -1 for row in self._rows]
        places = [self._rows.index(row) if row in self._rows else there.index(owners[row]) for row in rows]
        return {"text": text, "places": places, "marks": [UNCOND if unconditional else COND] * len(rows)}

    def _conditioned(self, text: Cond, places: list[int], marks: list[int]) -> dict[str, Any]:
        c = some_rows(self._c, places, marks)
        c["c_crossattn"] = tokens.vectors(text)
        if isinstance(text, Mapping) and "vector" in text:
            c["y"] = text["vector"]
        return c

    def join(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
        texts = first["text"], second["text"]
        lengths = [tokens.vectors(text).shape[1] for text in texts]
        longest = math.lcm(*lengths)
        if longest > 4 * min(lengths):  # the host's own bound
            return None
        vectors = torch.cat(
            [tokens.vectors(text).repeat(1, longest // tokens.vectors(text).shape[1], 1) for text in texts]
        )
        text: Cond = vectors
        if isinstance(texts[0], Mapping):
            text = {
                **{key: torch.cat([t[key] for t in texts]) for key in texts[0] if key != "crossattn"},
                "crossattn": vectors,
            }
        return {"text": text, **{key: first[key] + second[key] for key in ("places", "marks")}}

    def select(self, kwargs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        return {"c": some_rows(kwargs["c"], rows)}

    def _strength(self, image: int) -> float:
        """By which the host multiplies the scale: the sum of the weights of a prompt's parts."""
        assert self.step is not None
        strength = sum(self.step.weights[image])
        return 1.0 if math.isclose(strength, 1.0) else strength

    def unguided(self, image: int, unconditional: Tensor) -> list[Tensor]:
        return self._rows_for(image, unconditional, unconditional)

    def opposite(self, image: int, prompts: Tensor, unconditional: Tensor, s: float) -> list[Tensor]:
        assert self.step is not None
        weights = prompts.new_tensor(self.step.weights[image]).reshape(-1, 1, 1, 1)
        return self._rows_for(image, unconditional - s * (weights * (prompts - unconditional)).sum(0), unconditional)

    def _rows_for(self, image: int, wanted: Tensor, unconditional: Tensor) -> list[Tensor]:
        """The prompts' rows with which the host's own combination is what is wanted."""
        assert self.step is not None
        row, strength = wanted, self._strength(image)
        if self.step.scale is None:
            # The host follows the prompts' rows alone: those times their strength, for zeros stand in for the others.
            row = wanted / strength
        elif wanted is not unconditional:
            row = unconditional + (wanted - unconditional) / (self.step.scale * strength)
        return [row] * len(self.step.weights[image])
