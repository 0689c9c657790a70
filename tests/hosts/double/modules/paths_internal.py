"""Places of the double: its own folder as the program, a temporary folder for data."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

modules_path = os.path.dirname(os.path.realpath(__file__))
script_path = os.path.dirname(modules_path)
cwd = os.getcwd()
data_path = tempfile.mkdtemp(prefix="webui-double-")
atexit.register(shutil.rmtree, data_path, ignore_errors=True)
models_path = os.path.join(data_path, "models")
extensions_dir = os.path.join(data_path, "extensions")
extensions_builtin_dir = os.path.join(data_path, "extensions-builtin")
config_states_dir = os.path.join(data_path, "config_states")
