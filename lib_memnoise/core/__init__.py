"""What is measured and reported, in tensors and plain values; no host and no network."""
