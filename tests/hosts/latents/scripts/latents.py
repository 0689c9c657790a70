"""An extension for tests: saves a generation's latents, before they are decoded, to the file its argument names."""

import gradio as gr
import torch
from modules import scripts


class Latents(scripts.Script):
    def title(self):
        return "Latents"

    def show(self, is_img2img):
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False, label="file")]

    def post_sample(self, p, ps, file):
        if file:
            torch.save(ps.samples.detach().float().cpu(), file)
