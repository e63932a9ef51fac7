"""Initialisations of stored weights and LoRA pairs, one file each."""
