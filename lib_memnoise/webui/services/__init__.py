"""What is done on request, beside a generation: scores, calibrations, comparisons, traces."""
