"""Settings: what `shared.opts` is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules import errors
from modules.shared_cmd_options import cmd_opts


@dataclass
class OptionsCategory:
    id: str
    label: str


class OptionsCategories:
    def __init__(self) -> None:
        self.mapping: dict[str, OptionsCategory] = {}

    def register_category(self, category_id: str, label: str) -> str | None:
        if category_id in self.mapping:
            return category_id
        self.mapping[category_id] = OptionsCategory(category_id, label)
        return None


categories = OptionsCategories()


class OptionInfo:
    """One setting; the chained methods add the notes that the settings page shows."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        onchange: Callable | None = None,
        section: tuple | None = None,
        refresh: Callable | None = None,
        comment_before: str = "",
        comment_after: str = "",
        infotext: str | None = None,
        restrict_api: bool = False,
        category_id: str | None = None,
    ) -> None:
        self.default = default
        self.label = label
        self.component = component
        self.component_args = component_args
        self.onchange = onchange
        self.section = section
        self.category_id = category_id
        self.refresh = refresh
        self.do_not_save = False
        self.comment_before = comment_before
        self.comment_after = comment_after
        self.infotext = infotext
        self.restrict_api = restrict_api

    def link(self, label: str, url: str) -> OptionInfo:
        self.comment_before += f'[<a href="{url}" target="_blank">{label}</a>]'
        return self

    def js(self, label: str, js_func: str) -> OptionInfo:
        self.comment_before += f'[<a onclick="{js_func}(); return false">{label}</a>]'
        return self

    def info(self, info: str) -> OptionInfo:
        return self.html(f'<span class="info">({info})</span>')

    def html(self, html: str) -> OptionInfo:
        self.comment_after += html
        return self

    def needs_restart(self) -> OptionInfo:
        return self.html(' <span class="info">(requires restart)</span>')

    def needs_reload_ui(self) -> OptionInfo:
        return self.html(' <span class="info">(requires Reload UI)</span>')


class OptionHTML(OptionInfo):
    def __init__(self, text: str) -> None:
        super().__init__(str(text).strip(), component=lambda **kw: gr.HTML(elem_classes="settings-info", **kw))
        self.do_not_save = True


def options_section(section_identifier: tuple, options_dict: dict[str, OptionInfo]) -> dict[str, OptionInfo]:
    for info in options_dict.values():
        info.section = tuple(section_identifier[:2])
        if len(section_identifier) > 2:
            info.category_id = section_identifier[2]
    return options_dict


_OWN = ("data", "data_labels", "restricted_opts", "typemap")


class Options:
    """Attribute access to settings. As in the host, `data` starts empty where no settings file exists."""

    typemap = {int: float}

    def __init__(self, data_labels: dict[str, OptionInfo], restricted_opts: set[str]) -> None:
        self.data_labels = data_labels
        self.data: dict[str, Any] = {}
        self.restricted_opts = restricted_opts

    def __setattr__(self, key: str, value: Any) -> None:
        if key in _OWN or not (key in self.data or key in self.data_labels):
            object.__setattr__(self, key, value)
            return
        assert not cmd_opts.freeze_settings, "settings are frozen"
        info = self.data_labels[key]
        if info.do_not_save:
            return
        if isinstance(info.component_args, dict) and info.component_args.get("visible", True) is False:
            raise RuntimeError(f"setting {key!r} is restricted")
        if cmd_opts.hide_ui_dir_config and key in self.restricted_opts:
            raise RuntimeError(f"setting {key!r} is restricted by --hide-ui-dir-config")
        self.data[key] = value

    def __getattr__(self, key: str) -> Any:
        if key in _OWN:
            raise AttributeError(key)
        if key in self.data:
            return self.data[key]
        if key in self.data_labels:
            return self.data_labels[key].default
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}")

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        """Set one setting; True if it changed."""
        old = self.data.get(key)
        if old == value:
            return False
        info = self.data_labels[key]
        if info.do_not_save or (is_api and info.restrict_api):
            return False
        try:
            setattr(self, key, value)
        except RuntimeError:
            return False
        if run_callbacks and info.onchange is not None:
            try:
                info.onchange()
            except Exception as e:
                errors.display(e, f"setting {key} = {value}")
                setattr(self, key, old)
                return False
        return True

    def get_default(self, key: str) -> Any:
        info = self.data_labels.get(key)
        return None if info is None else info.default

    def save(self, filename: str) -> None:
        assert not cmd_opts.freeze_settings, "settings are frozen"
        with open(filename, "w", encoding="utf8") as file:
            json.dump(self.data, file, indent=4, ensure_ascii=False)

    def load(self, filename: str) -> None:
        try:
            with open(filename, encoding="utf8") as file:
                self.data = json.load(file)
        except FileNotFoundError:
            self.data = {}

    def onchange(self, key: str, func: Callable, call: bool = True) -> None:
        self.data_labels[key].onchange = func
        if call:
            func()

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        if not info.do_not_save:
            self.data.setdefault(key, info.default)

    def reorder(self) -> None:
        """Keep the items of a section, and the sections of a category, together."""
        category_of: dict[Any, str | None] = {}
        for info in self.data_labels.values():
            category_of.setdefault(info.section, info.category_id)
        order = {name: i for i, name in enumerate(categories.mapping)}
        for info in self.data_labels.values():
            info.category_id = category_of[info.section]

        def key(item: tuple[str, OptionInfo]) -> tuple[int, str]:
            info = item[1]
            return order.get(info.category_id or "", len(order)), (info.section or ("", ""))[1]

        self.data_labels = dict(sorted(self.data_labels.items(), key=key))

    def dumpjson(self) -> str:
        values = {k: self.data.get(k, v.default) for k, v in self.data_labels.items()}
        values["_comments_before"] = {k: v.comment_before for k, v in self.data_labels.items()}
        values["_comments_after"] = {k: v.comment_after for k, v in self.data_labels.items()}
        values["_categories"] = []
        return json.dumps(values)

    def cast_value(self, key: str, value: Any) -> Any:
        """A value, often text of an infotext, as the type of the setting's default."""
        if value is None:
            return None
        default = self.data_labels[key].default
        if default is None:
            default = getattr(self, key, None)
        if default is None:
            return None
        if isinstance(default, bool) and value == "False":
            return False
        return type(default)(value)
