"""Writers of folders that transformers, or engines with its layout, load."""
