"""The 15 corruptions of ImageNet-C and CIFAR-C as tensor operations on whole batches."""

from landscape.corruptions.apply import corrupt
from landscape.corruptions.severities import CORRUPTIONS, SEVERITIES, Profile

__all__ = ["CORRUPTIONS", "SEVERITIES", "Profile", "corrupt"]
