"""Export targets as data: one torch-free file each."""
