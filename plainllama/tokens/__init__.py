"""Documents -> token shards -> rows, and the tokenizers between."""
