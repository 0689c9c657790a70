"""Helpers for evaluating a host's network in torch: patching, checkpointing, gradients in inference mode."""
