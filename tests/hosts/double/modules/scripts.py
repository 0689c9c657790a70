"""Scripts of extensions: their base class, their discovery, and the runner that calls their hooks."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr
from modules import errors, extensions, paths, script_callbacks, script_loading

AlwaysVisible = object()


class MaskBlendArgs:
    def __init__(
        self,
        current_latent: Any,
        nmask: Any,
        init_latent: Any,
        mask: Any,
        blended_latent: Any,
        denoiser: Any = None,
        sigma: Any = None,
    ) -> None:
        self.current_latent, self.nmask, self.init_latent = current_latent, nmask, init_latent
        self.mask, self.blended_latent = mask, blended_latent
        self.denoiser, self.sigma = denoiser, sigma
        self.is_final_blend = denoiser is None


class PostSampleArgs:
    def __init__(self, samples: Any) -> None:
        self.samples = samples


class PostprocessImageArgs:
    def __init__(self, image: Any) -> None:
        self.image = image


class PostProcessMaskOverlayArgs:
    def __init__(self, index: int, mask_for_overlay: Any, overlay_image: Any) -> None:
        self.index, self.mask_for_overlay, self.overlay_image = index, mask_for_overlay, overlay_image


class PostprocessBatchListArgs:
    def __init__(self, images: list) -> None:
        self.images = images


@dataclass
class OnComponent:
    component: gr.blocks.Block


class Script:
    """Base class of scripts. A hook that a subclass does not define is not called."""

    name: str | None = None
    section: str | None = None
    filename: str | None = None
    args_from: int | None = None
    args_to: int | None = None
    alwayson = False
    is_txt2img = False
    is_img2img = False
    tabname: str | None = None
    group: Any = None
    create_group = True
    infotext_fields: Any = None
    paste_field_names: list[str] | None = None
    api_info: Any = None
    on_before_component_elem_id: list | None = None
    on_after_component_elem_id: list | None = None
    setup_for_ui_only = False
    controls: Any = None

    def title(self) -> str:
        raise NotImplementedError()

    def ui(self, is_img2img: bool) -> Any:
        pass

    def show(self, is_img2img: bool) -> Any:
        return True

    def run(self, p: Any, *args: Any) -> Any:
        pass

    def setup(self, p: Any, *args: Any) -> None:
        pass

    def before_process(self, p: Any, *args: Any) -> None:
        pass

    def process(self, p: Any, *args: Any) -> None:
        pass

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def after_extra_networks_activate(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def postprocess_batch_list(self, p: Any, pp: PostprocessBatchListArgs, *args: Any, **kwargs: Any) -> None:
        pass

    def on_mask_blend(self, p: Any, mba: MaskBlendArgs, *args: Any) -> None:
        pass

    def post_sample(self, p: Any, ps: PostSampleArgs, *args: Any) -> None:
        pass

    def postprocess_image(self, p: Any, pp: PostprocessImageArgs, *args: Any) -> None:
        pass

    def postprocess_maskoverlay(self, p: Any, ppmo: PostProcessMaskOverlayArgs, *args: Any) -> None:
        pass

    def postprocess_image_after_composite(self, p: Any, pp: PostprocessImageArgs, *args: Any) -> None:
        pass

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        pass

    def before_component(self, component: Any, **kwargs: Any) -> None:
        pass

    def after_component(self, component: Any, **kwargs: Any) -> None:
        pass

    def before_hr(self, p: Any, *args: Any) -> None:
        pass

    def on_before_component(self, callback: Callable, *, elem_id: str) -> None:
        self.on_before_component_elem_id = [*(self.on_before_component_elem_id or []), (elem_id, callback)]

    def on_after_component(self, callback: Callable, *, elem_id: str) -> None:
        self.on_after_component_elem_id = [*(self.on_after_component_elem_id or []), (elem_id, callback)]

    def describe(self) -> str:
        return ""

    def _id_prefix(self) -> str:
        both_tabs = self.show(True) == self.show(False)
        return ("img2img_" if self.is_img2img else "txt2img_") if both_tabs else ""

    def elem_id(self, item_id: str) -> str:
        title = re.sub("[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_{self._id_prefix()}{title}_{item_id}"


class ScriptBuiltinUI(Script):
    """Part of the host's own page, made as a script."""

    setup_for_ui_only = True

    def elem_id(self, item_id: str) -> str:
        return self._id_prefix() + item_id

    def show(self, is_img2img: bool) -> Any:
        return AlwaysVisible


class ScriptFile(NamedTuple):
    basedir: str
    filename: str
    path: str


class ScriptClassData(NamedTuple):
    script_class: type
    path: str
    basedir: str
    module: Any


scripts_data: list[ScriptClassData] = []
postprocessing_scripts_data: list[ScriptClassData] = []
current_basedir = paths.script_path


def basedir() -> str:
    """The folder of the extension whose script is being loaded."""
    return current_basedir


def list_scripts(scriptdirname: str, extension: str, *, include_extensions: bool = True) -> list[ScriptFile]:
    own = extensions.Extension(paths.script_path).list_files(scriptdirname, extension)
    files = [ScriptFile(paths.script_path, os.path.basename(path), path) for path in own]
    for ext in extensions.active() if include_extensions else []:
        files += [
            ScriptFile(ext.path, os.path.basename(path), path) for path in ext.list_files(scriptdirname, extension)
        ]
    return files


def load_scripts() -> None:
    """Execute all script files and make new runners; a script that fails is reported and left out."""
    global current_basedir, scripts_txt2img, scripts_img2img
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    before = sys.path
    files = list_scripts("scripts", ".py")
    files += list_scripts("modules/processing_scripts", ".py", include_extensions=False)
    for file in files:
        try:
            if file.basedir != paths.script_path:
                sys.path = [file.basedir, *sys.path]
            current_basedir = file.basedir
            module = script_loading.load_module(file.path)
            for value in list(vars(module).values()):
                if inspect.isclass(value) and issubclass(value, Script):
                    scripts_data.append(ScriptClassData(value, file.path, file.basedir, module))
        except Exception:
            errors.report(f"script {file.filename} failed to load", exc_info=True)
        finally:
            sys.path = before
            current_basedir = paths.script_path
    scripts_txt2img = ScriptRunner()
    scripts_img2img = ScriptRunner()


def wrap_call(func: Callable, filename: str, funcname: str, *args: Any, default: Any = None, **kwargs: Any) -> Any:
    try:
        return func(*args, **kwargs)
    except Exception:
        errors.report(f"{funcname} of {filename} failed", exc_info=True)
    return default


class ScriptRunner:
    """The scripts of one tab."""

    callback_names = (
        "before_process process before_process_batch after_extra_networks_activate process_batch postprocess "
        "postprocess_batch postprocess_batch_list post_sample on_mask_blend postprocess_image "
        "postprocess_maskoverlay postprocess_image_after_composite before_component after_component"
    ).split()

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.selectable_scripts: list[Script] = []
        self.alwayson_scripts: list[Script] = []
        self.titles: list[str] = []
        self.title_map: dict[str, Script] = {}
        self.infotext_fields: list = []
        self.paste_field_names: list[str] = []
        self.inputs: list[Any] = [None]
        self.on_before_component_elem_id: dict[str, list] = {}
        self.on_after_component_elem_id: dict[str, list] = {}

    # Making the page

    def initialize_scripts(self, is_img2img: bool) -> None:
        for scripts in (self.scripts, self.alwayson_scripts, self.selectable_scripts):
            scripts.clear()
        for data in scripts_data:
            try:
                script = data.script_class()
            except Exception:
                errors.report(f"script {data.module} could not be made", exc_info=True)
                continue
            script.filename = data.path
            script.is_txt2img, script.is_img2img = not is_img2img, is_img2img
            script.tabname = "img2img" if is_img2img else "txt2img"
            visibility = script.show(is_img2img)
            if visibility == AlwaysVisible:
                script.alwayson = True
                self.alwayson_scripts.append(script)
            elif visibility:
                self.selectable_scripts.append(script)
            else:
                continue
            self.scripts.append(script)
        self.apply_on_before_component_callbacks()

    def apply_on_before_component_callbacks(self) -> None:
        """Take over what scripts asked for in `__init__`, `show` or `ui`."""
        for script in self.scripts:
            for name, table in (
                ("on_before_component_elem_id", self.on_before_component_elem_id),
                ("on_after_component_elem_id", self.on_after_component_elem_id),
            ):
                for elem_id, callback in getattr(script, name) or []:
                    table.setdefault(elem_id, []).append((callback, script))
                setattr(script, name, [])

    def create_script_ui(self, script: Script) -> None:
        script.args_from = script.args_to = len(self.inputs)
        try:
            self._create_script_ui(script)
        except Exception:
            errors.report(f"the controls of {script.name} could not be made", exc_info=True)

    def _create_script_ui(self, script: Script) -> None:
        from modules.api import models

        controls = wrap_call(script.ui, script.filename or "", "ui", script.is_img2img)
        script.controls = controls
        if controls is None:
            return
        script.name = wrap_call(script.title, script.filename or "", "title", default=script.filename).lower()
        infos = []
        for control in controls:
            control.custom_script_source = os.path.basename(script.filename or "")
            info = models.ScriptArg(label=control.label or "")
            for field in ("value", "minimum", "maximum", "step"):
                if getattr(control, field, None) is not None:
                    setattr(info, field, getattr(control, field))
            choices = getattr(control, "choices", None)
            if choices is not None:
                info.choices = [x[0] if isinstance(x, tuple) else x for x in choices]
            infos.append(info)
        script.api_info = models.ScriptInfo(
            name=script.name, is_img2img=script.is_img2img, is_alwayson=script.alwayson, args=infos
        )
        self.infotext_fields += script.infotext_fields or []
        self.paste_field_names += script.paste_field_names or []
        self.inputs += controls
        script.args_to = len(self.inputs)

    def setup_ui_for_section(self, section: str | None, scriptlist: list[Script] | None = None) -> None:
        for script in self.alwayson_scripts if scriptlist is None else scriptlist:
            if script.alwayson and script.section != section:
                continue
            if script.create_group:
                with gr.Group(visible=script.alwayson) as group:
                    self.create_script_ui(script)
                script.group = group
            else:
                self.create_script_ui(script)

    def prepare_ui(self) -> None:
        self.inputs = [None]

    def setup_ui(self) -> list[Any]:
        titles = [wrap_call(x.title, x.filename or "", "title") or x.filename for x in self.scripts]
        self.title_map = {title.lower(): script for title, script in zip(titles, self.scripts)}
        self.titles = [
            wrap_call(x.title, x.filename or "", "title") or f"{x.filename} [error]" for x in self.selectable_scripts
        ]
        self.setup_ui_for_section(None)
        dropdown = gr.Dropdown(
            label="Script", elem_id="script_list", choices=["None", *self.titles], value="None", type="index"
        )
        self.inputs[0] = dropdown
        self.setup_ui_for_section(None, self.selectable_scripts)

        def select(index: int | None) -> Any:
            updates = [gr.update(visible=index == i) for i in range(1, len(self.selectable_scripts) + 1)]
            # gradio takes a list for the value itself where there is only one output
            return updates[0] if len(updates) == 1 else updates

        dropdown.change(fn=select, inputs=[dropdown], outputs=[x.group for x in self.selectable_scripts])
        self.infotext_fields.append((dropdown, lambda x: gr.update(value=x.get("Script", "None"))))
        self.apply_on_before_component_callbacks()
        return self.inputs

    def script(self, title: str) -> Script | None:
        return self.title_map.get(title.lower())

    # Running

    def run(self, p: Any, *args: Any) -> Any:
        if not args[0]:
            return None
        script = self.selectable_scripts[args[0] - 1]
        return script.run(p, *args[script.args_from : script.args_to])

    def list_scripts_for_method(self, method_name: str) -> list[Script]:
        return self.scripts if method_name in ("before_component", "after_component") else self.alwayson_scripts

    def ordered_scripts(self, method_name: str) -> list[Script]:
        default = getattr(Script, method_name, None)
        scripts = self.list_scripts_for_method(method_name)
        return [x for x in scripts if getattr(type(x), method_name, None) != default]

    def _each(self, method: str, p: Any, *before: Any, **kwargs: Any) -> None:
        """Call a hook of every always visible script, with its own part of the arguments."""
        for script in self.ordered_scripts(method):
            try:
                args = p.script_args[script.args_from : script.args_to]
                getattr(script, method)(p, *before, *args, **kwargs)
            except Exception:
                errors.report(f"{method} of {script.filename} failed", exc_info=True)

    def setup_scrips(self, p: Any, *, is_ui: bool = True) -> None:
        for script in self.ordered_scripts("setup"):
            if script.setup_for_ui_only and not is_ui:
                continue
            try:
                script.setup(p, *p.script_args[script.args_from : script.args_to])
            except Exception:
                errors.report(f"setup of {script.filename} failed", exc_info=True)

    def before_process(self, p: Any) -> None:
        self._each("before_process", p)

    def process(self, p: Any) -> None:
        self._each("process", p)

    def process_before_every_sampling(self, p: Any, **kwargs: Any) -> None:
        self._each("process_before_every_sampling", p, **kwargs)

    def before_process_batch(self, p: Any, **kwargs: Any) -> None:
        self._each("before_process_batch", p, **kwargs)

    def after_extra_networks_activate(self, p: Any, **kwargs: Any) -> None:
        self._each("after_extra_networks_activate", p, **kwargs)

    def process_batch(self, p: Any, **kwargs: Any) -> None:
        self._each("process_batch", p, **kwargs)

    def postprocess(self, p: Any, processed: Any) -> None:
        self._each("postprocess", p, processed)

    def postprocess_batch(self, p: Any, images: Any, **kwargs: Any) -> None:
        self._each("postprocess_batch", p, images=images, **kwargs)

    def postprocess_batch_list(self, p: Any, pp: PostprocessBatchListArgs, **kwargs: Any) -> None:
        self._each("postprocess_batch_list", p, pp, **kwargs)

    def post_sample(self, p: Any, ps: PostSampleArgs) -> None:
        self._each("post_sample", p, ps)

    def on_mask_blend(self, p: Any, mba: MaskBlendArgs) -> None:
        self._each("on_mask_blend", p, mba)

    def postprocess_image(self, p: Any, pp: PostprocessImageArgs) -> None:
        self._each("postprocess_image", p, pp)

    def postprocess_maskoverlay(self, p: Any, ppmo: PostProcessMaskOverlayArgs) -> None:
        self._each("postprocess_maskoverlay", p, ppmo)

    def postprocess_image_after_composite(self, p: Any, pp: PostprocessImageArgs) -> None:
        self._each("postprocess_image_after_composite", p, pp)

    def before_hr(self, p: Any) -> None:
        self._each("before_hr", p)

    def _component(self, when: str, elem_id: str | None, table: dict, component: Any, kwargs: dict) -> None:
        for callback, script in table.get(elem_id, []):
            try:
                callback(OnComponent(component=component))
            except Exception:
                errors.report(f"on_{when} of {script.filename} failed", exc_info=True)
        for script in self.ordered_scripts(when):
            try:
                getattr(script, when)(component, **kwargs)
            except Exception:
                errors.report(f"{when} of {script.filename} failed", exc_info=True)

    def before_component(self, component: Any, **kwargs: Any) -> None:
        self._component("before_component", kwargs.get("elem_id"), self.on_before_component_elem_id, component, kwargs)

    def after_component(self, component: Any, **kwargs: Any) -> None:
        self._component("after_component", component.elem_id, self.on_after_component_elem_id, component, kwargs)

    def set_named_arg(self, args: Any, script_name: str, arg_elem_id: str, value: Any, fuzzy: bool = False) -> Any:
        """A copy of `args` with the value of the component that has this element id."""
        script = next((x for x in self.scripts if x.name == script_name), None)
        if script is None:
            raise RuntimeError(f"there is no script {script_name}")
        for i, control in enumerate(script.controls):
            if arg_elem_id == control.elem_id or (fuzzy and arg_elem_id in control.elem_id):
                changed = list(args)
                changed[(script.args_from or 0) + i] = value
                if isinstance(args, list):
                    args[:] = changed
                    return args
                return tuple(changed)
        raise RuntimeError(f"script {script_name} has no component {arg_elem_id}")


scripts_txt2img: ScriptRunner = ScriptRunner()
scripts_img2img: ScriptRunner = ScriptRunner()
scripts_current: ScriptRunner | None = None
