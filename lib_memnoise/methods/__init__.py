"""The mitigation methods, one module each, and the pipeline that runs one on a batch of latents."""
