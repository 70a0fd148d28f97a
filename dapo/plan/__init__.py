"""What is planned and checked before a device is used: the environment, and the packs of a step. No torch."""
