"""Vocabularies cut to the tokens that a text uses: the choice of tokens, the tokenizer, and the rows of the tables."""
