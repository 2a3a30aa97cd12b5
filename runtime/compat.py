"""The private torch names that tpplan uses, in one place, tested on every supported torch."""

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

__all__ = ["FakeTensorMode", "TreeSpec", "tree_flatten", "tree_map_only", "tree_unflatten"]
