"""Healing objectives: the losses that a stage can minimise, one file each."""
