"""The routes that generate, and those that extensions and their tests use beside them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from contextlib import closing
from secrets import compare_digest
from typing import Any

import gradio as gr
from fastapi import Depends, FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import (
    errors,
    images,
    infotext_utils,
    script_callbacks,
    scripts,
    sd_models,
    sd_samplers,
    sd_schedulers,
    shared,
    ui,
)
from modules.api import models
from modules.processing import (
    StableDiffusionProcessingImg2Img,
    StableDiffusionProcessingTxt2Img,
    process_images,
)
from PIL import Image, PngImagePlugin


def script_name_to_index(name: str, scripts: list) -> int:
    try:
        return [script.title().lower() for script in scripts].index(name.lower())
    except Exception as e:
        raise HTTPException(status_code=422, detail=f"there is no script {name!r}") from e


def validate_sampler_name(name: str) -> str:
    if name not in sd_samplers.all_samplers_map:
        raise HTTPException(status_code=400, detail="there is no such sampler")
    return name


def decode_base64_to_image(encoding: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(base64.b64decode(encoding.split(",", 1)[-1])))
    except Exception as e:
        raise HTTPException(status_code=500, detail="this is no image in base64") from e


def encode_pil_to_base64(image: Image.Image) -> bytes:
    metadata = PngImagePlugin.PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            metadata.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=metadata)
    return base64.b64encode(buffer.getvalue())


def _error(request: Request, e: Exception) -> JSONResponse:
    own = vars(e)
    content = {
        "error": type(e).__name__,
        "detail": own.get("detail", ""),
        "body": own.get("body", ""),
        "errors": str(e),
    }
    if not isinstance(e, HTTPException):
        errors.report(f"API error: {request.method}: {request.url} {content}", exc_info=True)
    return JSONResponse(status_code=own.get("status_code", 500), content=jsonable_encoder(content))


def api_middleware(app: FastAPI) -> None:
    """Every exception becomes JSON, on the whole app."""

    @app.middleware("http")
    async def exception_handling(request: Request, call_next: Callable) -> Any:
        try:
            return await call_next(request)
        except Exception as e:
            return _error(request, e)

    async def handler(request: Request, e: Exception) -> JSONResponse:
        return _error(request, e)

    app.add_exception_handler(Exception, handler)
    app.add_exception_handler(HTTPException, handler)


class Api:
    def __init__(self, app: FastAPI, queue_lock: Any) -> None:
        self.credentials = {}
        if shared.cmd_opts.api_auth:
            self.credentials = dict(pair.split(":") for pair in shared.cmd_opts.api_auth.split(","))
        self.app = app
        self.queue_lock = queue_lock
        api_middleware(app)
        for method, path, endpoint in (
            ("POST", "txt2img", self.text2imgapi),
            ("POST", "img2img", self.img2imgapi),
            ("POST", "png-info", self.pnginfoapi),
            ("GET", "progress", self.progressapi),
            ("POST", "interrupt", self.interruptapi),
            ("POST", "skip", self.skip),
            ("GET", "options", self.get_config),
            ("POST", "options", self.set_config),
            ("GET", "cmd-flags", self.get_cmd_flags),
            ("GET", "samplers", self.get_samplers),
            ("GET", "schedulers", self.get_schedulers),
            ("GET", "upscalers", lambda: []),
            ("GET", "latent-upscale-modes", lambda: [{"name": name} for name in shared.latent_upscale_modes]),
            ("GET", "sd-models", self.get_sd_models),
            ("GET", "scripts", self.get_scripts_list),
            ("GET", "script-info", self.get_script_info),
        ):
            self.add_api_route(f"/sdapi/v1/{path}", endpoint, methods=[method])

        runners = scripts.scripts_txt2img, scripts.scripts_img2img
        if not all(runner.scripts for runner in runners):
            ui.create_ui()
        self.default_script_arg_txt2img, self.default_script_arg_img2img = map(self.init_default_script_args, runners)

    def add_api_route(self, path: str, endpoint: Callable, **kwargs: Any) -> None:
        if shared.cmd_opts.api_auth:
            kwargs["dependencies"] = [Depends(self.auth)]
        self.app.add_api_route(path, endpoint, **kwargs)

    def auth(self, credentials: HTTPBasicCredentials = Depends(HTTPBasic())) -> bool:
        expected = self.credentials.get(credentials.username)
        if expected is None or not compare_digest(credentials.password, expected):
            raise HTTPException(
                status_code=401, detail="user or password is wrong", headers={"WWW-Authenticate": "Basic"}
            )
        return True

    # Scripts and their arguments

    def get_selectable_script(self, script_name: str | None, script_runner: Any) -> tuple[Any, int | None]:
        if not script_name:
            return None, None
        index = script_name_to_index(script_name, script_runner.selectable_scripts)
        return script_runner.selectable_scripts[index], index

    def get_script(self, script_name: str | None, script_runner: Any) -> Any:
        if not script_name:
            return None, None
        return script_runner.scripts[script_name_to_index(script_name, script_runner.scripts)]

    def init_default_script_args(self, script_runner: Any) -> list[Any]:
        """The values that the page starts with; asks each script's `ui()` twice more."""
        args: list[Any] = [None] * max([1, *(script.args_to for script in script_runner.scripts)])
        args[0] = 0
        with gr.Blocks():
            for script in script_runner.scripts:
                if script.ui(script.is_img2img):
                    controls = script.ui(script.is_img2img)
                    args[script.args_from : script.args_to] = [control.value for control in controls]
        return args

    def init_script_args(
        self,
        request: Any,
        default_script_args: list,
        selectable_script: Any,
        selectable_idx: int | None,
        script_runner: Any,
        *,
        input_script_args: dict[int, Any] | None = None,
    ) -> list[Any]:
        """Defaults, then values from an infotext, then the request's; surplus arguments are dropped."""
        args = default_script_args.copy()
        for index, value in (input_script_args or {}).items():
            args[index] = value
        if selectable_script:
            args[selectable_script.args_from : selectable_script.args_to] = request.script_args
            args[0] = (selectable_idx or 0) + 1
        for name, given in (request.alwayson_scripts or {}).items():
            script = self.get_script(name, script_runner)
            if script is None:
                raise HTTPException(status_code=422, detail=f"there is no always visible script {name!r}")
            if script.alwayson is False:
                raise HTTPException(status_code=422, detail=f"script {name!r} is not always visible")
            if "args" in given:
                count = min(script.args_to - script.args_from, len(given["args"]))
                for i in range(count):
                    args[script.args_from + i] = given["args"][i]
        return args

    def apply_infotext(
        self,
        request: Any,
        tabname: str,
        *,
        script_runner: Any = None,
        mentioned_script_args: dict[int, Any] | None = None,
    ) -> dict[str, Any]:
        """Fill what the request leaves open from its `infotext`: its own fields, settings, script arguments."""
        if not request.infotext:
            return {}
        fields = infotext_utils.paste_fields[tabname]["fields"]
        given = request.dict(exclude_unset=True)
        params = infotext_utils.parse_generation_parameters(request.infotext)

        def value_of(field: Any) -> Any:
            value = field.function(params) if field.function else params.get(field.label)
            if value is None:
                return None
            own = request.__fields__.get(field.api)
            kind = own.type_ if own is not None else type(field.component.value)
            if kind is type(None):
                return None
            if isinstance(value, dict) and value.get("__type__") == "generic_update":
                value = value.get("value")
            return value if value is None or isinstance(value, kind) else kind(value)

        for field in fields:
            if field.api and field.api not in given:
                value = value_of(field)
                if value is not None:
                    setattr(request, field.api, value)
        request.override_settings = request.override_settings or {}
        for _, name, value in infotext_utils.get_override_settings(params):
            request.override_settings.setdefault(name, value)
        if script_runner is not None and mentioned_script_args is not None:
            index_of = {component: i for i, component in enumerate(script_runner.inputs)}
            for field in fields:
                if field.component in index_of:
                    value = value_of(field)
                    if value is not None:
                        mentioned_script_args[index_of[field.component]] = value
        return params

    # Generation

    def _generate(self, request: Any, tab: str, runner: Any, defaults: list, cls: type, **more: Any) -> Any:
        from_infotext: dict[int, Any] = {}
        self.apply_infotext(request, tab, script_runner=runner, mentioned_script_args=from_infotext)
        selectable, index = self.get_selectable_script(request.script_name, runner)
        sampler, scheduler = sd_samplers.get_sampler_and_scheduler(
            request.sampler_name or request.sampler_index, request.scheduler
        )
        args = dict(vars(request), sampler_name=validate_sampler_name(sampler), sampler_index=None, **more)
        args["do_not_save_samples"] = args["do_not_save_grid"] = not request.save_images
        if not args["scheduler"] and scheduler != "Automatic":
            args["scheduler"] = scheduler
        for name in (
            "script_name",
            "script_args",
            "alwayson_scripts",
            "infotext",
            "save_images",
            "include_init_images",
        ):
            args.pop(name, None)
        send_images = args.pop("send_images", True)
        script_args = self.init_script_args(
            request, defaults, selectable, index, runner, input_script_args=from_infotext
        )
        with self.queue_lock, closing(cls(sd_model=shared.sd_model, **args)) as p:
            p.is_api = True
            p.scripts = runner
            try:
                shared.state.begin(job=f"scripts_{tab}")
                if selectable is not None:
                    p.script_args = script_args
                    processed = runner.run(p, *p.script_args)
                else:
                    p.script_args = tuple(script_args)
                    processed = process_images(p)
            finally:
                shared.state.end()
                shared.total_tqdm.clear()
        encoded = [encode_pil_to_base64(image) for image in processed.images] if send_images else []
        return models.ImagesResponse(images=encoded, parameters=vars(request), info=processed.js())

    def text2imgapi(self, txt2imgreq: models.StableDiffusionTxt2ImgProcessingAPI) -> Any:  # type: ignore[valid-type]
        runner, defaults = scripts.scripts_txt2img, self.default_script_arg_txt2img
        return self._generate(txt2imgreq, "txt2img", runner, defaults, StableDiffusionProcessingTxt2Img)

    def img2imgapi(self, img2imgreq: models.StableDiffusionImg2ImgProcessingAPI) -> Any:  # type: ignore[valid-type]
        encoded = img2imgreq.init_images  # type: ignore[attr-defined]
        if encoded is None:
            raise HTTPException(status_code=404, detail="there are no init_images")
        runner, defaults = scripts.scripts_img2img, self.default_script_arg_img2img
        decoded = [decode_base64_to_image(x) for x in encoded]
        mask = img2imgreq.mask and decode_base64_to_image(img2imgreq.mask)  # type: ignore[attr-defined]
        answer = self._generate(
            img2imgreq, "img2img", runner, defaults, StableDiffusionProcessingImg2Img, init_images=decoded, mask=mask
        )
        answer.parameters["init_images"] = None
        return answer

    # The rest

    def pnginfoapi(self, req: models.PNGInfoRequest) -> Any:
        info, items = images.read_info_from_image(decode_base64_to_image(req.image.strip()))
        params = infotext_utils.parse_generation_parameters(info or "")
        script_callbacks.infotext_pasted_callback(info or "", params)
        text = {key: value for key, value in items.items() if isinstance(value, str)}
        return models.PNGInfoResponse(info=info or "", items=text, parameters=params)

    def progressapi(self) -> Any:
        state = shared.state
        if state.job_count == 0:
            return models.ProgressResponse(progress=0, eta_relative=0, state=state.dict(), textinfo=state.textinfo)
        done, jobs = 0.01, state.job_count
        done += state.job_no / jobs if jobs > 0 else 0
        done += state.sampling_step / state.sampling_steps / jobs if state.sampling_steps > 0 else 0
        since = time.time() - state.time_start
        return models.ProgressResponse(
            progress=min(done, 1), eta_relative=since / done - since, state=state.dict(), textinfo=state.textinfo
        )

    def interruptapi(self) -> dict:
        shared.state.interrupt()
        return {}

    def skip(self) -> None:
        shared.state.skip()

    def get_config(self) -> dict[str, Any]:
        opts = shared.opts
        return {key: opts.data.get(key, info.default) for key, info in opts.data_labels.items()}

    def set_config(self, req: dict[str, Any]) -> None:
        name = req.get("sd_model_checkpoint")
        if name is not None and name not in sd_models.checkpoint_aliases:
            raise RuntimeError(f"there is no model {name!r}")
        for key, value in req.items():
            shared.opts.set(key, value, is_api=True)

    def get_cmd_flags(self) -> dict[str, Any]:
        return vars(shared.cmd_opts)

    def get_samplers(self) -> list:
        return [{"name": x.name, "aliases": x.aliases, "options": x.options} for x in sd_samplers.all_samplers]

    def get_schedulers(self) -> list:
        names = ("name", "label", "aliases", "default_rho", "need_inner_model")
        return [{name: getattr(x, name) for name in names} for x in sd_schedulers.schedulers]

    def get_sd_models(self) -> list:
        return [
            {
                "title": x.title,
                "model_name": x.model_name,
                "hash": x.shorthash,
                "sha256": x.sha256,
                "filename": x.filename,
                "config": None,
            }
            for x in sd_models.checkpoints_list.values()
        ]

    def get_scripts_list(self) -> Any:
        def names(runner: Any) -> list[str]:
            return [script.name for script in runner.scripts if script.name is not None]

        return models.ScriptsList(txt2img=names(scripts.scripts_txt2img), img2img=names(scripts.scripts_img2img))

    def get_script_info(self) -> list:
        both = [*scripts.scripts_txt2img.scripts, *scripts.scripts_img2img.scripts]
        return [script.api_info for script in both if script.api_info is not None]
