"""The phases of benchmarks/gpu.sh, and what they share."""
