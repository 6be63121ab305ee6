"""The plain-PyTorch kernels, which specify the operators; the compiled ones are tested against them."""
