"""The network itself: loading, positions, attention and log-probabilities; shared by trainer and generation."""

from dapo import torchvision_cpu

# transformers' model files import torchvision; every module of this package imports them after this line has run.
torchvision_cpu.install()
