"""Generation of text through transformers."""
