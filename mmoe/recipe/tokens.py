"""The special tokens that every tokenizer of ours begins with, and that batches, models and exports go by."""

PAD, BOS, EOS, IMAGE = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
