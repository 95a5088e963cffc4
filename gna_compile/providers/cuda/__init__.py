"""The native CUDA kernels."""
