"""How a decoding step runs, never what it computes: buffers that stay where they are, kernels, captured graphs."""
