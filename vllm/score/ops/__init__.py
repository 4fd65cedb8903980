"""From hidden states to the scores of rows: the PyTorch reference and the choice of kernel."""
