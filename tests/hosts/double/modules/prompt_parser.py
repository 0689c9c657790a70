"""Prompts: editing schedules `[a:b:0.5]`, `AND` with weights, emphasis, and batches of conditions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

import torch

# --- prompt editing -------------------------------------------------------------------------------------------


@dataclass
class _Switch:
    before: list[_Node]
    after: list[_Node]
    when: str


@dataclass
class _Cycle:
    options: list[list[_Node]]


_Node = Union[str, _Switch, _Cycle]
_NUMBER = re.compile(r"\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*")


def _sequence(text: str, i: int, closers: str) -> tuple[list[_Node], int]:
    """Parse up to an unescaped character of `closers`; returns the nodes and where it stopped."""
    nodes: list[_Node] = []
    while i < len(text) and text[i] not in closers:
        if text[i] == "\\" and i + 1 < len(text):
            nodes.append(text[i : i + 2])
            i += 2
            continue
        group = _group(text, i) if text[i] in "([" else None
        if group is None:
            nodes.append(text[i])
            i += 1
        else:
            nodes += group[0]
            i = group[1]
    return nodes, i


def _group(text: str, i: int) -> tuple[list[_Node], int] | None:
    """Parse a bracket that opens at `i`, or None if it never closes."""
    if text[i] == "(":
        inside, end = _sequence(text, i + 1, ")")
        return (["(", *inside, ")"], end + 1) if end < len(text) else None
    parts: list[list[_Node]] = []
    separators: list[str] = []
    end = i
    while True:
        part, end = _sequence(text, end + 1, "]:|")
        if end >= len(text):
            return None
        parts.append(part)
        if text[end] == "]":
            break
        separators.append(text[end])
    if separators and set(separators) == {"|"}:
        return [_Cycle(parts)], end + 1
    last = "".join(x for x in parts[-1] if isinstance(x, str))
    number = _NUMBER.fullmatch(last)
    if set(separators) == {":"} and len(parts) in (2, 3) and number and all(isinstance(x, str) for x in parts[-1]):
        return [_Switch(parts[0] if len(parts) == 3 else [], parts[-2], number.group(1))], end + 1
    literal: list[_Node] = ["["]
    for part, separator in zip(parts, [*separators, "]"]):
        literal += [*part, separator]
    return literal, end + 1


def get_learned_conditioning_prompt_schedules(
    prompts: Sequence[str], base_steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> list[list[list[Any]]]:
    """For each prompt, its texts with the last step of each: `[[5, 'a '], [10, 'a b']]`."""
    second_pass = hires_steps is not None and not use_old_scheduling
    steps: int = hires_steps if second_pass else base_steps  # type: ignore[assignment]

    def step_of(when: str) -> int:
        value = float(when)
        if use_old_scheduling:
            value = value * steps if value < 1 else value
        elif "." in when:
            value = (value - (1.0 if second_pass else 0.0)) * steps
        else:
            value -= base_steps if second_pass else 0
        return min(steps, int(value))

    def changes(nodes: list[_Node]) -> Iterator[int]:
        for node in nodes:
            if isinstance(node, _Switch):
                yield step_of(node.when)
                yield from changes(node.before)
                yield from changes(node.after)
            elif isinstance(node, _Cycle):
                yield from range(1, steps + 1)
                for option in node.options:
                    yield from changes(option)

    def text_at(nodes: list[_Node], step: int) -> str:
        parts = []
        for node in nodes:
            if isinstance(node, str):
                parts.append(node)
            elif isinstance(node, _Switch):
                parts.append(text_at(node.before if step <= step_of(node.when) else node.after, step))
            else:
                parts.append(text_at(node.options[(step - 1) % len(node.options)], step))
        return "".join(parts)

    def schedule(prompt: str) -> list[list[Any]]:
        nodes, _ = _sequence(prompt, 0, "")
        ends = sorted({steps, *(step for step in changes(nodes) if step >= 1)})
        return [[end, text_at(nodes, end)] for end in ends]

    known = {prompt: schedule(prompt) for prompt in set(prompts)}
    return [known[prompt] for prompt in prompts]


# --- conditions -----------------------------------------------------------------------------------------------


class ScheduledPromptConditioning(NamedTuple):
    end_at_step: int
    cond: Any


class SdConditioning(list):
    """Prompts together with what SDXL's encoder wants to know of the image."""

    def __init__(
        self,
        prompts: Sequence[str],
        is_negative_prompt: bool = False,
        width: int | None = None,
        height: int | None = None,
        copy_from: Any = None,
    ) -> None:
        super().__init__(prompts)
        source = prompts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(source, "is_negative_prompt", False)
        self.width = width or getattr(source, "width", None)
        self.height = height or getattr(source, "height", None)


def get_learned_conditioning(
    model: Any, prompts: Any, steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> list[list[ScheduledPromptConditioning]]:
    schedules = get_learned_conditioning_prompt_schedules(prompts, steps, hires_steps, use_old_scheduling)
    cache: dict[str, list[ScheduledPromptConditioning]] = {}
    for prompt, schedule in zip(prompts, schedules):
        if prompt in cache:
            continue
        encoded = model.get_learned_conditioning(SdConditioning([text for _, text in schedule], copy_from=prompts))
        cache[prompt] = [
            ScheduledPromptConditioning(
                end, {k: v[i] for k, v in encoded.items()} if isinstance(encoded, dict) else encoded[i]
            )
            for i, (end, _) in enumerate(schedule)
        ]
    return [cache[prompt] for prompt in prompts]


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules: list[ScheduledPromptConditioning], weight: float = 1.0) -> None:
        self.schedules = schedules
        self.weight = weight


class MulticondLearnedConditioning:
    def __init__(self, shape: tuple, batch: list[list[ComposableScheduledPromptConditioning]]) -> None:
        self.shape = shape
        self.batch = batch


_PART = re.compile(r"(.*?)(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*", re.S)


def get_multicond_prompt_list(prompts: Any) -> tuple[list[list[tuple[int, float]]], SdConditioning, dict[str, int]]:
    """Split prompts at AND: for each prompt its parts as (index, weight), the list of parts, and their indices."""
    flat = SdConditioning([], copy_from=prompts)
    index_of: dict[str, int] = {}
    per_prompt = []
    for prompt in prompts:
        entries = []
        for part in re.split(r"\bAND\b", prompt):
            match = _PART.fullmatch(part)
            text, weight = match.groups() if match else (part, None)
            if text not in index_of:
                index_of[text] = len(flat)
                flat.append(text)
            entries.append((index_of[text], 1.0 if weight is None else float(weight)))
        per_prompt.append(entries)
    return per_prompt, flat, index_of


def get_multicond_learned_conditioning(
    model: Any, prompts: Any, steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> MulticondLearnedConditioning:
    per_prompt, flat, _ = get_multicond_prompt_list(prompts)
    learned = get_learned_conditioning(model, flat, steps, hires_steps, use_old_scheduling)
    batch = [[ComposableScheduledPromptConditioning(learned[i], w) for i, w in parts] for parts in per_prompt]
    return MulticondLearnedConditioning(shape=(len(prompts),), batch=batch)


class DictWithShape(dict):
    def __init__(self, x: dict, shape: Any = None) -> None:
        super().__init__(x)

    @property
    def shape(self) -> torch.Size:
        return self["crossattn"].shape


def _at(schedules: list[ScheduledPromptConditioning], step: int) -> Any:
    return next((x.cond for x in schedules if step <= x.end_at_step), schedules[0].cond)


def reconstruct_cond_batch(c: list[list[ScheduledPromptConditioning]], current_step: int) -> Any:
    conds = [_at(schedules, current_step) for schedules in c]
    if isinstance(conds[0], dict):
        return DictWithShape({k: torch.stack([x[k] for x in conds]) for k in conds[0]})
    return torch.stack(conds)


def stack_conds(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stack prompts of different lengths: the shorter ones repeat their last vector."""
    longest = max(len(x) for x in tensors)
    return torch.stack([torch.cat([x, x[-1:].repeat(longest - len(x), 1)]) if x.ndim > 1 else x for x in tensors])


def reconstruct_multicond_batch(c: MulticondLearnedConditioning, current_step: int) -> tuple[list, Any]:
    """The rows of the conditional half, and for each image which rows it uses with which weights."""
    rows: list[Any] = []
    conds_list = []
    for parts in c.batch:
        conds_list.append([(len(rows) + i, part.weight) for i, part in enumerate(parts)])
        rows += [_at(part.schedules, current_step) for part in parts]
    if isinstance(rows[0], dict):
        return conds_list, DictWithShape({k: stack_conds([x[k] for x in rows]) for k in rows[0]})
    return conds_list, stack_conds(rows)


# --- emphasis -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")


def parse_prompt_attention(text: str) -> list[list[Any]]:
    """Pieces of the prompt with their weights: `(x)` 1.1, `(x:1.3)` 1.3, `[x]` 1/1.1; BREAK has weight -1."""
    pieces: list[list[Any]] = []
    open_brackets: list[tuple[str, int]] = []

    def close(kind: str, factor: float) -> bool:
        for n in range(len(open_brackets) - 1, -1, -1):
            if open_brackets[n][0] == kind:
                for piece in pieces[open_brackets.pop(n)[1] :]:
                    piece[1] *= factor
                return True
        return False

    for match in _TOKEN.finditer(text):
        token, weight = match.group(0), match.group(1)
        if token[0] == "\\":
            pieces.append([token[1:], 1.0])
        elif token in "([":
            open_brackets.append((token, len(pieces)))
        elif weight is not None and close("(", float(weight)):
            continue
        elif token == ")" and close("(", 1.1):
            continue
        elif token == "]" and close("[", 1 / 1.1):
            continue
        else:
            for n, part in enumerate(re.split(r"\s*\bBREAK\b\s*", token)):
                pieces += [["BREAK", -1]] if n else []
                pieces.append([part, 1.0])
    while open_brackets:
        close(open_brackets[-1][0], 1.1 if open_brackets[-1][0] == "(" else 1 / 1.1)

    merged: list[list[Any]] = []
    for piece in pieces or [["", 1.0]]:
        if merged and merged[-1][1] == piece[1]:
            merged[-1][0] += piece[0]
        else:
            merged.append(piece)
    return merged
