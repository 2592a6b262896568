"""Computing again in the backward pass what need not be kept, and showing what is kept."""
