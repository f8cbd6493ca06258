"""The public name of `Tokenizer` for Python programs; its room is `text/`."""

from megalite.text.tokenizer import Tokenizer as Tokenizer
