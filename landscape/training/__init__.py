"""Training core: images resident on the device, batched augmentation, and a plain training loop."""
