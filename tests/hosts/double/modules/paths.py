"""As `paths_internal`; kept apart because extensions import either."""

from modules.paths_internal import (  # noqa: F401
    cwd,
    data_path,
    extensions_builtin_dir,
    extensions_dir,
    models_path,
    modules_path,
    script_path,
)
