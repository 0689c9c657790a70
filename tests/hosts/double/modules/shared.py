"""The host's shared objects."""

from __future__ import annotations

import sys
from typing import Any

import gradio as gr
from modules import _settings_table, options, shared_cmd_options, util
from modules.paths_internal import data_path, extensions_dir, models_path, script_path  # noqa: F401
from modules.shared_state import State
from modules.styles import StyleDatabase

cmd_opts = shared_cmd_options.cmd_opts
parser = shared_cmd_options.parser

OptionInfo = options.OptionInfo
OptionHTML = options.OptionHTML
options_section = options.options_section
options_templates: dict[str, options.OptionInfo] = {}
restricted_opts = {"outdir_samples", "outdir_txt2img_samples", "outdir_img2img_samples", "outdir_grids"}

parallel_processing_allowed = True
batch_cond_uncond = True
config_filename = cmd_opts.ui_settings_file
hide_dirs = {"visible": not cmd_opts.hide_ui_dir_config}
demo: gr.Blocks | None = None
device: Any = None
xformers_available = False
hypernetworks: dict[str, str] = {}
loaded_hypernetworks: list[Any] = []
face_restorers: list[Any] = []
sd_upscalers: list[Any] = []
tab_names: list[str] = []
settings_components: dict[str, Any] = {}
gradio_theme = gr.themes.Base()
progress_print_out = sys.stdout
hf_endpoint = "https://huggingface.co"

latent_upscale_default_mode = "Latent"
latent_upscale_modes = {
    label: {"mode": mode, "antialias": antialias}
    for label, mode, antialias in (
        ("Latent", "bilinear", False),
        ("Latent (antialiased)", "bilinear", True),
        ("Latent (bicubic)", "bicubic", False),
        ("Latent (bicubic antialiased)", "bicubic", True),
        ("Latent (nearest)", "nearest", False),
        ("Latent (nearest-exact)", "nearest-exact", False),
    )
}

natural_sort_key = util.natural_sort_key
listfiles = util.listfiles
html_path = util.html_path
html = util.html


class _TotalProgress:
    """The console's progress bar over all steps: silent here."""

    def reset(self) -> None:
        pass

    def update(self) -> None:
        pass

    def updateTotal(self, new_total: int) -> None:
        pass

    def clear(self) -> None:
        pass


class _MemoryMonitor:
    disabled = True


opts = options.Options({}, restricted_opts)
state = State()
prompt_styles = StyleDatabase()
total_tqdm = _TotalProgress()
mem_mon = _MemoryMonitor()


def reset_settings() -> None:
    """Settings as after a first start: the known ones, nothing stored."""
    global options_templates
    options_templates = _settings_table.build()
    opts.data_labels = options_templates
    opts.data = {}


reset_settings()


class Shared(type(sys.modules[__name__])):  # type: ignore[misc]
    """The module itself: `shared.sd_model` is loaded when it is first asked for."""

    @property
    def sd_model(self) -> Any:
        from modules import sd_models

        return sd_models.model_data.get_sd_model()

    @sd_model.setter
    def sd_model(self, value: Any) -> None:
        from modules import sd_models

        sd_models.model_data.set_sd_model(value)


sys.modules[__name__].__class__ = Shared

from modules import devices  # noqa: E402

device = devices.device
