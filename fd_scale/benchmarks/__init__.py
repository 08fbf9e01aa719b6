"""Whole steps on one GPU, beside what they are held against: `fd-scale bench giant`."""

from fd_scale.benchmarks.giant import bench_giant

__all__ = ["bench_giant"]
