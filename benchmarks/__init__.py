"""What the speed claims rest on: `python -m benchmarks NAME` runs one and writes its results."""
