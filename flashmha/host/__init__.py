"""This machine and the PyTorch on it: what can be asked of them, whatever the problem."""
