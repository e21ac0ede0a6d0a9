"""The small convolutional classifier, under the name that recipes give it."""

from distill_core.networks.classifier import Classifier

NETWORKS = {"classifier": Classifier}
