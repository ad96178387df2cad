"""Many training runs: the grid they are trained in, and what it found."""
