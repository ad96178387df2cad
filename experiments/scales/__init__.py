"""Training runs of several sizes and token counts, and the scaling law that is fitted to them."""
