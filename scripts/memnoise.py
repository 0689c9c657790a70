"""Memnoise: the WebUI's entry point. Glue only; the extension is in `lib_memnoise`."""

from modules import script_callbacks, scripts

from lib_memnoise.host import support

if support.lacks():
    Memnoise = type("Memnoise", (support.Refused,), {})
else:
    from lib_memnoise.host import api, arguments, course, page, refusals, ui, xyz

    class Memnoise(scripts.Script):
        def title(self):
            return xyz.TITLE

        def show(self, is_img2img):
            if not hasattr(self, "page"):  # the host asks more than once, and of both tabs
                self.page = page.Page(self, "img2img" if self.is_img2img else "txt2img")
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            components, self.infotext_fields = ui.build(self.elem_id, self.page)
            return components

        def setup(self, p, *args):
            refusals.expect_cells(p)
            refused = arguments.requested(p, args)
            if not isinstance(refused, arguments.Refusal):
                refused = xyz.refused_axis(p)
            if refused is not None:
                arguments.refuse_before_plot(p, refused)

        def before_process(self, p, *args):
            course.begin(p, arguments.requested(p, args), is_img2img=self.is_img2img)

        def process(self, p, *args):
            course.describe(p)

        def process_before_every_sampling(self, p, *args, x, noise, c, uc, **kwargs):
            course.adjust_noise(p, x=x, noise=noise, c=c, uc=uc)

        def postprocess_batch(self, p, *args, batch_number, **kwargs):
            course.comment(p, batch_number)

        def postprocess(self, p, processed, *args):
            course.finish(p, processed)

    # Each registration costs the host a walk up the whole stack (some 30 ms), so there are no more than needed.
    ui.settings_page()
    if not xyz.register():
        script_callbacks.on_before_ui(xyz.register)
    script_callbacks.on_cfg_denoiser(course.on_cfg_denoiser)
    script_callbacks.on_app_started(api.register)
