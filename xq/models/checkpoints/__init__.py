"""Weights of other projects: which file it is, what it holds, and the module of xq for it."""

from xq.models.checkpoints.format import Format as Format
from xq.models.checkpoints.key_table import (
    Drop as Drop,
    KeyTable as KeyTable,
    Rename as Rename,
    Split as Split,
)
from xq.models.checkpoints.load import (
    Found as Found,
    formats as formats,
    inspect_checkpoint as inspect_checkpoint,
    load_checkpoint as load_checkpoint,
)
