"""The control tokens that every tokenizer begins with."""

PAD, MASK, BOS, EOS = 0, 1, 2, 3

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[BOS]", "[EOS]")
