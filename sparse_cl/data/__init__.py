"""Data that people have: read from files and the Hub, checked, split, and encoded as token ids."""

from .checks import check_records, check_text, check_tokenizer, show
from .encoding import EncodedRecords
from .reading import SCORED, read_records
from .records import DataError, Records, hold_out, parse_columns
from .windows import cut_texts

__all__ = [
    "SCORED",
    "DataError",
    "EncodedRecords",
    "Records",
    "check_records",
    "check_text",
    "check_tokenizer",
    "cut_texts",
    "hold_out",
    "parse_columns",
    "read_records",
    "show",
]
