"""What runs without a WebUI: the sampler, an analytic toy model, and the demo that compares the methods on it.

The modules here need torch and numpy only, and call the same `lib_memnoise.mitigations` that the WebUI runs.
"""
