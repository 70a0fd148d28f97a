"""Must run before a test module imports transformers' model files."""

from dapo import torchvision_cpu

torchvision_cpu.install()
