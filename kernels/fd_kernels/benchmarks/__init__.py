"""The ops on a GPU beside their peers: time, memory, roofline. `python -m fd_kernels.benchmarks`."""
