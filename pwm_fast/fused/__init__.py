"""Hand-written forward and backward passes, on exchangeable elementwise kernels and GEMMs."""
