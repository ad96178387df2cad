"""A rank for every layer: spectra and subspaces of a training, ranks at one budget, factorised models, and the comparison in training.

``spectra`` singular values of weights and gradients, and how far gradient subspaces turn; ``correlation`` whether effective ranks of both go
together; ``allotment`` ranks by weights and by gradients; ``factors`` models whose matrices are products of two, ``export`` what they lose and save;
``contest`` equal budgets against each other.
``experiments.ranks`` is the command.
"""
