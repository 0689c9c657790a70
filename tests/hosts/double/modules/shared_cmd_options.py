"""Command line options: the ones an extension may look at, with the host's defaults."""

from __future__ import annotations

import argparse
import os

from modules.paths_internal import data_path, extensions_builtin_dir, extensions_dir, models_path

parser = argparse.ArgumentParser()
for _flag in (
    "allow-code api api-log api-server-stop autolaunch ckpt-none cpu-ignored disable-all-extensions "
    "disable-console-progressbars disable-extra-extensions disable-nan-check disable-safe-unpickle "
    "do-not-download-clip enable-insecure-extension-access force-enable-xformers freeze-settings "
    "gradio-debug hide-ui-dir-config listen lowram lowvram medvram medvram-sdxl no-download-sd-model no-gradio-queue "
    "no-half no-half-vae no-hashing no-prompt-history nowebui opt-channelslast opt-sdp-attention "
    "opt-sdp-no-mem-attention opt-split-attention opt-split-attention-v1 opt-sub-quad-attention share "
    "skip-install skip-load-model-at-start skip-prepare-environment skip-python-version-check "
    "skip-torch-cuda-test skip-version-check ui-debug-mode upcast-sampling use-textbox-seed xformers"
).split():
    parser.add_argument(f"--{_flag}", action="store_true")
for _name in (
    "api-auth ckpt ckpt-dir device-id freeze-settings-in-sections freeze-specific-settings gradio-auth "
    "gradio-auth-path ngrok server-name subpath theme tls-certfile tls-keyfile vae-dir vae-path "
    "localizations-dir"
).split():
    parser.add_argument(f"--{_name}", type=str, default=None)
parser.add_argument("--port", type=int, default=None)
parser.add_argument("--precision", type=str, choices=["full", "half", "autocast"], default="autocast")
parser.add_argument("--use-cpu", nargs="+", default=[])
parser.add_argument("--styles-file", type=str, action="append", default=[])
parser.add_argument("--data-dir", type=str, default=data_path)
parser.add_argument("--models-dir", type=str, default=models_path)
parser.add_argument("--ui-settings-file", type=str, default=os.path.join(data_path, "config.json"))
parser.add_argument("--ui-config-file", type=str, default=os.path.join(data_path, "ui-config.json"))
parser.add_argument("--embeddings-dir", type=str, default=os.path.join(data_path, "embeddings"))
parser.add_argument("--hypernetwork-dir", type=str, default=os.path.join(models_path, "hypernetworks"))
parser.add_argument("--extensions-dir", type=str, default=extensions_dir)
parser.add_argument("--extensions-builtin-dir", type=str, default=extensions_builtin_dir)

cmd_opts = parser.parse_args([])


def apply(args: tuple[str, ...]) -> None:
    """Replace the options in place: other modules hold the same object."""
    new, unknown = parser.parse_known_args(list(args))
    if unknown:
        raise ValueError(f"the double does not know the command line arguments {unknown}")
    vars(cmd_opts).clear()
    vars(cmd_opts).update(vars(new))
    cmd_opts.webui_is_non_local = bool(cmd_opts.share or cmd_opts.listen or cmd_opts.ngrok or cmd_opts.server_name)
    cmd_opts.disable_extension_access = cmd_opts.webui_is_non_local and not cmd_opts.enable_insecure_extension_access


apply(())
