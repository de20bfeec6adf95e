"""How fast it is, beside a plain PyTorch loop and beside the machine: `python -m benchmarks --help`."""
