"""PyTorch's own operators: runs everywhere."""
