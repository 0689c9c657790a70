"""Memnoise: the WebUI's entry point. Glue only; the extension is in `lib_memnoise`."""

from modules import script_callbacks, scripts

from lib_memnoise.webui import support

if support.lacks():
    Memnoise = type("Memnoise", (support.Refused,), {})
else:
    from lib_memnoise.webui import api, failures, hooks, request
    from lib_memnoise.webui.ui import accordion, buttons, xyz_axes

    class Memnoise(scripts.Script):
        def title(self):
            return request.TITLE

        def show(self, is_img2img):
            if not hasattr(self, "page"):  # the host asks more than once, and of both tabs
                self.page = buttons.Page(self, "img2img" if self.is_img2img else "txt2img")
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            components, self.infotext_fields = accordion.build(self.elem_id, self.page)
            return components

        def setup(self, p, *args):
            failures.expect_cells(p)
            refused = request.requested(p, args)
            if not isinstance(refused, request.Refusal):
                refused = xyz_axes.refused_axis(p)
            if refused is not None:
                request.refuse_before_plot(p, refused)

        def before_process(self, p, *args):
            hooks.begin(p, request.requested(p, args), is_img2img=self.is_img2img)

        def process(self, p, *args):
            hooks.describe(p)

        def process_before_every_sampling(self, p, *args, x, noise, c, uc, **kwargs):
            hooks.adjust_noise(p, x=x, noise=noise, c=c, uc=uc)

        def postprocess_batch(self, p, *args, batch_number, **kwargs):
            hooks.comment(p, batch_number)

        def postprocess(self, p, processed, *args):
            hooks.finish(p, processed)

    # Each registration costs the host a walk up the whole stack (some 30 ms), so there are no more than needed.
    accordion.settings_page()
    if not xyz_axes.register():
        script_callbacks.on_before_ui(xyz_axes.register)
    script_callbacks.on_cfg_denoiser(hooks.on_cfg_denoiser)
    script_callbacks.on_app_started(api.register)
