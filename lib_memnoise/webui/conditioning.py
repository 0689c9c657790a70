"""Conditions that replace an image's prompt for one pass. The host's own conditions are not changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from modules import devices, prompt_parser, shared

from lib_memnoise.errors import Unsupported
from lib_memnoise.methods.batch import Prompt
from lib_memnoise.sampling import cond_rows
from lib_memnoise.sampling.cond_rows import Cond, select_rows
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row, cross_attentions
from lib_memnoise.webui import tokens
from lib_memnoise.webui.sampling_pass import SamplingPass


class ConditioningOverride:
    """Encodes replaced prompts once for each checkpoint that a pass uses, and provides the conditions of each step."""

    def __init__(self, current: SamplingPass, prompts: Mapping[int, Prompt]) -> None:
        """
        Raises:
            Unsupported: this checkpoint has no cross-attention, padding or text encoder such as the prompts need.
        """
        self.p, c = current.p, current.c
        self.prompts = dict(prompts)
        self.reports = current.reports
        self.first_owners = [len(parts) for parts in c.batch]
        self.first = cond_rows.vectors(prompt_parser.reconstruct_multicond_batch(c, 0)[1])
        self.checkpoint = self._checkpoint()
        if any(prompt.attention for prompt in self.prompts.values()) and not cross_attentions(current.backend.unet):
            raise Unsupported("no cross-attention was found in the network")
        if any(prompt.pad_zero for prompt in self.prompts.values()) and not padded_with_end():
            raise Unsupported("the text encoder pads with token 0 already, and there is no padding to fix")
        for prompt in self.prompts.values():
            if prompt.zero_end or prompt.attention:
                tokens.text_encoder()
        self._encoded: Any = None
        self._encoded_for: Any = None
        self._places: dict[str, tokens.Places] = {}
        self._schedules: dict[str, tokens.Schedules] = {}
        self._encode()

    @staticmethod
    def _checkpoint() -> Any:
        # A refiner of the same architecture is loaded into the same model object.
        return shared.sd_model, shared.sd_model.sd_checkpoint_info

    def _texts(self) -> list[str]:
        host_prompts = self.p.hr_prompts if self.p.is_hr_pass else self.p.prompts
        return [
            text if (prompt := self.prompts.get(image)) is None or prompt.text is None else prompt.text
            for image, text in enumerate(host_prompts)
        ]

    def _steps(self) -> tuple[Any, ...]:
        """The arguments about steps that the host passes when it encodes its own prompts."""
        p = self.p
        if not p.is_hr_pass:
            return p.firstpass_steps, None, shared.opts.use_old_scheduling
        from modules import sd_samplers

        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        steps = p.hr_second_pass_steps or p.steps
        return p.firstpass_steps, config.total_steps(steps) if config else steps, shared.opts.use_old_scheduling

    def _encode(self) -> None:
        """Encode the whole batch as the host would, if any prompt is to be encoded differently."""
        self._encoded, self._encoded_for = None, self._checkpoint()
        if not self._recoded():
            return
        padded = any(prompt.pad_zero for prompt in self.prompts.values())
        p, steps = self.p, self._steps()
        size = {"width": p.width, "height": p.height}
        if p.is_hr_pass:
            size = {"width": p.hr_upscale_to_x, "height": p.hr_upscale_to_y}
        negative_texts = p.hr_negative_prompts if p.is_hr_pass else p.negative_prompts
        with devices.autocast(), padding_with_zero() if padded else contextlib.nullcontext():
            texts = prompt_parser.SdConditioning(self._texts(), **size)
            prompts = prompt_parser.get_multicond_learned_conditioning(shared.sd_model, texts, *steps)
            negative = empty = None
            if padded:
                negatives = prompt_parser.SdConditioning(negative_texts, is_negative_prompt=True, **size)
                nothing = prompt_parser.SdConditioning([""], is_negative_prompt=True, **size)
                negative = prompt_parser.get_learned_conditioning(shared.sd_model, negatives, *steps)
                empty = prompt_parser.get_learned_conditioning(shared.sd_model, nothing, *steps)
        self._encoded = prompts, negative, empty

    def _recoded(self) -> list[int]:
        """The images whose prompt is encoded differently. Other changes are made to the host's own vectors."""
        return [i for i, prompt in self.prompts.items() if prompt.text is not None or prompt.pad_zero]

    def _now(self) -> Any:
        """The encoded conditions for the checkpoint that is loaded now."""
        if self._encoded_for != self._checkpoint():
            self._encode()
        return self._encoded

    def step_texts(self, image: int, step: int) -> list[str]:
        """The texts of the prompt's parts (AND) at a step."""
        text = self._texts()[image]
        if text not in self._schedules:
            self._schedules[text] = tokens.schedules(text, *self._steps())
        return tokens.step_texts(self._schedules[text], step)

    def places(self, text: str) -> tokens.Places:
        """The places of a text's tokens in its condition."""
        if text not in self._places:
            self._places[text] = tokens.places(text)
        return self._places[text]

    def text_cond(self, denoiser: Any, cond: Cond) -> Cond:
        """The prompts' rows of a step, with those of replaced prompts changed.

        Raises:
            RuntimeError: the rows are not the host's own, because another extension changed them.
        """
        step, batch = denoiser.step, denoiser.sampler.sampler_extra_args["cond"].batch
        owners = [image for image, parts in enumerate(batch) for _ in parts]
        if cond_rows.vectors(cond).shape[0] != len(owners):
            raise RuntimeError("another extension changed the batch")
        encoded = self._now()
        if encoded is not None:
            edited = self._recoded()
            host_cond = denoiser.sampler.sampler_extra_args["cond"]
            mixed = prompt_parser.MulticondLearnedConditioning(
                host_cond.shape, [encoded[0].batch[i] if i in edited else parts for i, parts in enumerate(batch)]
            )
            cond = self._mixed(cond, prompt_parser.reconstruct_multicond_batch(mixed, step)[1], owners, edited)
        return self._with_vectors(cond, owners, step)

    def _mixed(self, before: Cond, after: Cond, owners: list[int], edited: list[int]) -> Cond:
        """The rows of `edited` images from `after`, and all others from `before`, as other extensions left them."""
        if cond_rows.vectors(before).shape != cond_rows.vectors(after).shape:
            for image in set(owners).difference(edited):
                self.reports[image].note("its prompt was padded to the length of another in its batch")
            return after
        rows = torch.tensor([owner in edited for owner in owners])

        def mix(old: Any, new: Any) -> Any:
            mask = rows.to(old.device).reshape(-1, *[1] * (old.ndim - 1))
            return torch.where(mask, new, old)

        if isinstance(before, dict):
            return prompt_parser.DictWithShape({key: mix(value, after[key]) for key, value in before.items()})
        return mix(before, after)

    def _with_vectors(self, cond: Cond, owners: list[int], step: int) -> Cond:
        """The condition with end tokens zeroed and learnt vectors put in."""
        values = cond_rows.vectors(cond)
        changed = values.clone()
        for image, prompt in self.prompts.items():
            rows = [row for row, owner in enumerate(owners) if owner == image]
            if prompt.zero_end:
                for row, text in zip(rows, self.step_texts(image, step)):
                    changed[row, list(self.places(text).ends)] = 0
            if prompt.vectors is not None:
                first = self.first[[row for row, owner in enumerate(self._first_rows()) if owner == image]]
                learnt = prompt.vectors[:, : first.shape[1]].to(values)
                if self._checkpoint() != self.checkpoint:
                    self.reports[image].note("after the refiner took over its prompt was heard as it is")
                elif values[rows].shape != first.shape:
                    self.reports[image].note("where its prompt has another length it was heard as it is")
                elif torch.equal(values[rows], first):
                    changed[rows] = learnt
                else:  # prompt editing: another prompt, moved by the same difference
                    changed[rows] = values[rows] + (learnt - first)
        return cond_rows.with_vectors(cond, changed)

    def _first_rows(self) -> list[int]:
        """The image that each row of the first step's condition belongs to."""
        return [image for image, count in enumerate(self.first_owners) for _ in range(count)]

    def text_uncond(self, denoiser: Any, uncond: Cond) -> Cond:
        """The unconditional rows of a step."""
        encoded = self._now()
        edited = [image for image, prompt in self.prompts.items() if prompt.pad_zero]
        if encoded is None or encoded[1] is None:
            return uncond
        after = prompt_parser.reconstruct_cond_batch(encoded[1], denoiser.step)
        batch = cond_rows.vectors(uncond).shape[0]
        if batch != cond_rows.vectors(after).shape[0]:
            raise RuntimeError("another extension changed the batch")
        return self._mixed(uncond, after, list(range(batch)), edited)

    def empty(self, empty: Cond, batch: int) -> Cond:
        """The empty prompt's row for every image, from its one row."""
        rows = select_rows(empty, [0] * batch)
        encoded = self._now()
        if encoded is None or encoded[2] is None:
            return rows
        after = select_rows(prompt_parser.reconstruct_cond_batch(encoded[2], 0), [0] * batch)
        return self._mixed(
            rows, after, list(range(batch)), [i for i, prompt in self.prompts.items() if prompt.pad_zero]
        )

    def rows(self, denoiser: Any) -> list[Row]:
        """How the prompts' rows of a step are attended to."""
        attended = []
        for image, parts in enumerate(denoiser.sampler.sampler_extra_args["cond"].batch):
            attention = self.prompts[image].attention if image in self.prompts else None
            if attention is None:
                attended += [PLAIN] * len(parts)
                continue
            for text in self.step_texts(image, denoiser.step):
                place = self.places(text)
                attended.append(Row(attention.scale, place.starts, place.unpadded if attention.mask_padding else None))
        return attended


def padded_with_end() -> list[Any]:
    """The text encoders that pad with their end token."""
    return [
        encoder
        for encoder in tokens.text_encoders()
        if getattr(encoder, "id_pad", 0) != 0 and encoder.id_pad == getattr(encoder, "id_end", None)
    ]


@contextlib.contextmanager
def padding_with_zero() -> Iterator[None]:
    """A context in which text encoders that pad with their end token pad with token 0 instead."""
    encoders = padded_with_end()
    before = [encoder.id_pad for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.id_pad = 0
        yield
    finally:
        for encoder, token in zip(encoders, before):
            encoder.id_pad = token
