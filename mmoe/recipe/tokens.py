"""Names of the special tokens that a tokenizer trained here begins with, in the order of :class:`Special`'s fields."""

from mmoe.recipe.model import Special

OURS = Special()
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
IMAGE = SPECIAL[-1]
"""What stands for a picture in a text that an exported processor reads, whatever the tokenizer calls its token."""
