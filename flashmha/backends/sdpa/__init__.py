"""PyTorch's own attention."""
