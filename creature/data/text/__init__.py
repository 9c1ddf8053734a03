"""Text: where it is, how it is read, and the corpus of token ids that it becomes."""
