"""Measurements and reports, in tensors and plain values. Nothing here knows a host or a network."""
