"""What is run with a site switched off: a file for each folder of csrc that has kernels, with its list `SCENARIOS`."""
