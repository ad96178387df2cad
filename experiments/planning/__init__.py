"""Steps that several processes make together, timed beside what theory/step_time.py says of them."""
