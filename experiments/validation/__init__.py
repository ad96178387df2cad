"""Formula meets sampler: checks with resolution, on synthetic and on real gradients."""
