"""Adapts a model's head to a store's class distribution.

A model trained on all stores expects any product; a store sees what it sells, as often as it sells it. Which of two
products a blurred photo shows then also depends on how frequent each is (Saerens, Latinne & Decaestecker 2002,
"Adjusting the Outputs of a Classifier to New a Priori Probabilities: A Simple Procedure", eq. 2.4):

    p_k(c | x) ~ p(c | x) · p_k(c) / p(c),   that is: logit c, and log p_k(c) - log p(c)

p_k(c) = (n_c + 1/2) / (n + K/2) for n photos at store k, n_c of them of class c (Krichevsky & Trofimov 1981). The class
distribution of all stores together is unknown to a store: p is taken as uniform.

Shapes: K classes, N photos.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedshelf.models.head import head_layers


def add_class_prior(module: nn.Module, labels_N: NDArray[np.int64]) -> bool:
    """Add the log class frequencies of labels to the bias of the head (p_k in the module's docstring).

    Args:
        module: the model, changed in place.
        labels_N: classes of the store's training photos.

    Returns:
        Whether the model has a head with a bias.
    """
    layers = head_layers(module)
    biases = [layer.bias for layer in layers.values() if layer.bias is not None]
    if not biases or len(biases) < len(layers):
        return False
    for bias_K in biases:
        counts_K = torch.from_numpy(np.bincount(labels_N, minlength=len(bias_K))).to(bias_K) + 0.5
        with torch.no_grad():
            bias_K.add_(torch.log(counts_K / counts_K.sum() * len(bias_K)))
    return True
