"""A gradient in tokens: its two factors, the vocabulary seen from the residual stream, and what an estimator keeps of it."""
