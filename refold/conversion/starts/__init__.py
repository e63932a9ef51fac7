"""How stored weights and LoRA pairs begin, one file each."""
