"""Tokenizers that behave unlike that of the tests."""


class WithBos:
    """The tokenizer of the tests, but with a BOS before and an EOS after a text (as Llama's and T5's do)."""

    bos_token_id, eos_token_id = 7, 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, add_special_tokens=True, **kwargs):
        encoded = dict(self.tokenizer(text, add_special_tokens=False, **kwargs))
        if add_special_tokens:
            encoded["input_ids"] = [7, *encoded["input_ids"], 0]
        return encoded
