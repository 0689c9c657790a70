"""What torch lacks for evaluating a host's network: patching, checkpointing, gradients in inference mode."""
