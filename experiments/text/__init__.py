"""Text: corpora, tokens, batches, and the data of a run."""
