"""All samplers, and finding one by its name."""

from __future__ import annotations

from typing import Any

from modules import (
    sd_samplers_common,
    sd_samplers_kdiffusion,
    sd_samplers_lcm,
    sd_samplers_timesteps,
    sd_schedulers,
    shared,
)
from modules.sd_samplers_common import sample_to_image, samples_to_image_grid  # noqa: F401

all_samplers: list[sd_samplers_common.SamplerData] = [
    *sd_samplers_kdiffusion.samplers_data_k_diffusion,
    *sd_samplers_timesteps.samplers_data_timesteps,
    *sd_samplers_lcm.samplers_data_lcm,
]
all_samplers_map = {x.name: x for x in all_samplers}
samplers = samplers_for_img2img = all_samplers
samplers_map: dict[str, str] = {}
samplers_hidden: set[str] = set()


def find_sampler_config(name: str | None) -> Any:
    return all_samplers[0] if name is None else all_samplers_map.get(name)


def create_sampler(name: str | None, model: Any) -> Any:
    config = find_sampler_config(name)
    assert config is not None, f"there is no sampler {name!r}"
    if model.is_sdxl and config.options.get("no_sdxl", False):
        raise Exception(f"{config.name} cannot sample SDXL")
    sampler = config.constructor(model)
    sampler.config = config
    return sampler


def set_samplers() -> None:
    global samplers_hidden
    samplers_hidden = set(shared.opts.hide_samplers)
    samplers_map.clear()
    for x in all_samplers:
        samplers_map.update({name.lower(): x.name for name in (x.name, *x.aliases)})


def visible_samplers() -> list[Any]:
    return [x for x in samplers if x.name not in samplers_hidden]


def visible_sampler_names() -> list[str]:
    return [x.name for x in visible_samplers()]


def get_sampler_and_scheduler(
    sampler_name: str | None, scheduler_name: str | None, *, convert_automatic: bool = True
) -> tuple[str, str]:
    """Names as the host has them today; older names carry the schedule behind them: `DPM++ 2M Karras`."""
    automatic = sd_schedulers.schedulers[0]
    scheduler = sd_schedulers.schedulers_map.get(scheduler_name or "", automatic)
    name = sampler_name or samplers[0].name
    for candidate in sd_schedulers.schedulers:
        for ending in (candidate.label, candidate.name, *(candidate.aliases or [])):
            if name.endswith(f" {ending}"):
                scheduler, name = candidate, name[: -len(ending) - 1]
                break
    sampler = all_samplers_map.get(name, samplers[0])
    if convert_automatic and sampler.options.get("scheduler") == scheduler.name:
        scheduler = automatic
    return sampler.name, scheduler.label


def get_sampler_from_infotext(d: dict) -> str:
    return get_sampler_and_scheduler(d.get("Sampler"), d.get("Schedule type"))[0]


def get_scheduler_from_infotext(d: dict) -> str:
    return get_sampler_and_scheduler(d.get("Sampler"), d.get("Schedule type"))[1]


def get_hr_sampler_and_scheduler(d: dict) -> tuple[str, str]:
    same_sampler, same_scheduler = "Use same sampler", "Use same scheduler"
    hr_sampler = d.get("Hires sampler", same_sampler)
    hr_scheduler = d.get("Hires schedule type", same_scheduler)
    sampler, scheduler = get_sampler_and_scheduler(
        d.get("Sampler") if hr_sampler == same_sampler else hr_sampler,
        d.get("Schedule type") if hr_scheduler == same_scheduler else hr_scheduler,
    )
    return (
        same_sampler if sampler == d.get("Sampler") else sampler,
        same_scheduler if scheduler == d.get("Schedule type") else scheduler,
    )


def get_hr_sampler_from_infotext(d: dict) -> str:
    return get_hr_sampler_and_scheduler(d)[0]


def get_hr_scheduler_from_infotext(d: dict) -> str:
    return get_hr_sampler_and_scheduler(d)[1]


def fix_p_invalid_sampler_and_scheduler(p: Any) -> None:
    p.sampler_name, p.scheduler = get_sampler_and_scheduler(p.sampler_name, p.scheduler, convert_automatic=False)


set_samplers()
