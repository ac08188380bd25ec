"""The same modules in another arrangement."""

import copy
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def sharing(module: ModuleT, **children: Any) -> ModuleT:
    """A shallow copy of `module` with some children replaced; all else, weights too, is shared."""
    new = copy.copy(module)
    # the copy would otherwise register its children in the original
    new._modules = {**module._modules, **children}
    return new
