"""HTTP endpoints."""

from __future__ import annotations

from typing import Any

from modules import shared

from lib_memnoise.settings import json_schema


def register(_: Any, app: Any) -> None:
    """`on_app_started`: endpoints under /memnoise/v1, guarded as the host's own are (`--api-auth`)."""
    guarded = next((route for route in app.routes if getattr(route, "path", "") == "/sdapi/v1/options"), None)
    if guarded is None and getattr(shared.cmd_opts, "api_auth", None):
        return  # a password was asked for, but the host's API that checks it is not there
    dependencies = list(guarded.dependencies) if guarded is not None else []
    app.add_api_route("/memnoise/v1/schema", json_schema, methods=["GET"], dependencies=dependencies)
