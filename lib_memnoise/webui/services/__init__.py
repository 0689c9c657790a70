"""Services besides generating: scores, calibrations, comparisons, traces."""
