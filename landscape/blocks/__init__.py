"""The blocks of a model: found, captured and removed.

- `view`: `Blocks`, what a user holds; `features`: what it captures;
- `tracing`: one recorded forward pass; `structure`: the blocks in it; `layout`: their maps;
- `passes`: passes that are observed, changed or begun in the middle; `lesions`: what to change.
"""

from landscape.blocks.block import Block
from landscape.blocks.view import Blocks, check_blocks

__all__ = ["Block", "Blocks", "check_blocks"]
