"""The groups of ``lowrank bench``: each a function of (configuration, device, limits) that gives rows, beside the machine's own limits."""
