"""What happens around a sampler, whatever host it belongs to."""
