"""The emulator of CUDA: what it finds, and its models of instructions."""
