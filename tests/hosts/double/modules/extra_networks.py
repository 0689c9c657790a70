"""`<lora:name:1>` and the like are taken out of the prompt and do nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

extra_network_registry: dict[str, Any] = {}


class ExtraNetworkParams:
    def __init__(self, items: list[str] | None = None) -> None:
        self.items = items or []
        self.positional = [x for x in self.items if "=" not in x]
        self.named = dict(x.split("=", 1) for x in self.items if "=" in x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExtraNetworkParams) and self.items == other.items


def parse_prompt(prompt: str) -> tuple[str, dict[str, list[ExtraNetworkParams]]]:
    found: dict[str, list[ExtraNetworkParams]] = defaultdict(list)

    def take(match: re.Match) -> str:
        found[match.group(1)].append(ExtraNetworkParams(match.group(2).split(":")))
        return ""

    return re.sub(r"<(\w+):([^>]+)>", take, prompt), found


def parse_prompts(prompts: list[str]) -> tuple[list[str], dict | None]:
    parsed = [parse_prompt(prompt) for prompt in prompts]
    return [text for text, _ in parsed], parsed[0][1] if parsed else None


def activate(p: Any, extra_network_data: Any) -> None:
    if p.scripts is not None:
        p.scripts.after_extra_networks_activate(
            p,
            batch_number=p.iteration,
            prompts=p.prompts,
            seeds=p.seeds,
            subseeds=p.subseeds,
            extra_network_data=extra_network_data,
        )


def deactivate(p: Any, extra_network_data: Any) -> None:
    pass


def initialize() -> None:
    extra_network_registry.clear()


def register_default_extra_networks() -> None:
    pass
