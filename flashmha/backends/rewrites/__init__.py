"""A problem made into one that a kernel can take, and its answer brought back."""
