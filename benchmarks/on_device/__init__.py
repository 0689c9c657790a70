"""What `benchmarks/device.sh` runs: memnoise on a GPU, in networks of Stable Diffusion's shapes."""
