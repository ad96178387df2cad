"""Training and timing on one CUDA device: what it needs packed small, cells in order of what they tell, parts that stop in time and go on."""
