"""Each barrier and index test of the kernels is switched off in turn, and something must notice."""
