"""Training behind one interface, `policy.Policy`: FSDP2, packing to tensors, optimiser, state. Knows no Ray."""

from dapo import torchvision_cpu

# transformers' model files import torchvision; modules of this package may import them in any order.
torchvision_cpu.install()
