"""Prompt styles: the double has none saved, but accepts names of them."""

from __future__ import annotations

from typing import NamedTuple


class PromptStyle(NamedTuple):
    name: str
    prompt: str | None
    negative_prompt: str | None
    path: str | None = None


def _apply(prompt: str, parts: list[str]) -> str:
    for part in filter(None, parts):
        prompt = part.replace("{prompt}", prompt) if "{prompt}" in part else ", ".join(filter(None, [prompt, part]))
    return prompt


class StyleDatabase:
    def __init__(self) -> None:
        self.styles: dict[str, PromptStyle] = {}

    def _find(self, names: list[str]) -> list[PromptStyle]:
        return [self.styles[name] for name in names if name in self.styles]

    def apply_styles_to_prompt(self, prompt: str, styles: list[str]) -> str:
        return _apply(prompt, [x.prompt or "" for x in self._find(styles)])

    def apply_negative_styles_to_prompt(self, prompt: str, styles: list[str]) -> str:
        return _apply(prompt, [x.negative_prompt or "" for x in self._find(styles)])

    def extract_styles_from_prompt(self, prompt: str, negative_prompt: str) -> tuple[list[str], str, str]:
        return [], prompt, negative_prompt
