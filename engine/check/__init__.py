"""Whether this machine is fit: kernels against their torch twins, texts of decoders against blt's, and speed."""
