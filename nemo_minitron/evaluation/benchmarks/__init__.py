"""Named benchmarks: lm-evaluation-harness's, and real data out of packages, where there is no hub."""
