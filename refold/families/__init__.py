"""Source architectures as data, one file per family. Torch-free."""
