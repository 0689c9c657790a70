"""The host's own gradio components."""

from __future__ import annotations

from typing import Any

import gradio as gr


class FormComponent:
    def get_expected_parent(self) -> type:
        return gr.components.Form


gr.Dropdown.get_expected_parent = FormComponent.get_expected_parent


def _form(base: type, block_name: str) -> type:
    return type(
        f"Form{base.__name__}",
        (FormComponent, base),
        {"get_block_name": lambda self: block_name, "__module__": __name__},
    )


FormRow: Any = _form(gr.Row, "row")
FormColumn: Any = _form(gr.Column, "column")
FormGroup: Any = _form(gr.Group, "group")
FormHTML: Any = _form(gr.HTML, "html")
FormColorPicker: Any = _form(gr.ColorPicker, "colorpicker")


class ToolButton(FormComponent, gr.Button):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        classes = ["tool", *kwargs.pop("elem_classes", [])]
        super().__init__(*args, elem_classes=classes, **kwargs)

    def get_block_name(self) -> str:
        return "button"


class ResizeHandleRow(gr.Row):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.elem_classes.append("resize-handle-row")

    def get_block_name(self) -> str:
        return "row"


class DropdownMulti(FormComponent, gr.Dropdown):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(multiselect=True, **kwargs)

    def get_block_name(self) -> str:
        return "dropdown"


class DropdownEditable(FormComponent, gr.Dropdown):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_custom_value=True, **kwargs)

    def get_block_name(self) -> str:
        return "dropdown"


class InputAccordion(gr.Checkbox):
    """An invisible checkbox whose value an accordion follows, and the other way round."""

    global_index = 0

    def __init__(self, value: bool, **kwargs: Any) -> None:
        self.accordion_id = kwargs.pop("elem_id", None)
        if self.accordion_id is None:
            self.accordion_id = f"input-accordion-{InputAccordion.global_index}"
            InputAccordion.global_index += 1
        super().__init__(value, **{**kwargs, "elem_id": f"{self.accordion_id}-checkbox", "visible": False})
        js = f"(checked) => inputAccordionChecked({self.accordion_id!r}, checked)"
        self.change(fn=None, _js=js, inputs=[self])
        accordion = {"label": "Accordion", **kwargs, "elem_classes": ["input-accordion"], "open": value}
        self.accordion = gr.Accordion(elem_id=self.accordion_id, **accordion)

    def extra(self) -> gr.Column:
        """A place in the head of the accordion."""
        return gr.Column(elem_id=f"{self.accordion_id}-extra", elem_classes="input-accordion-extra", min_width=0)

    def __enter__(self) -> InputAccordion:
        self.accordion.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.accordion.__exit__(*args)

    def get_block_name(self) -> str:
        return "checkbox"
