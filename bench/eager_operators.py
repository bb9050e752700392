"""Count the operators that a piece of code runs eagerly: on a GPU, each is a launch."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# What computes nothing and launches nothing.
VIEWS = set("view slice select unsqueeze transpose expand detach unbind alias split".split())
VIEWS |= set("_unsafe_view as_strided t permute _reshape_alias lift_fresh empty".split())


class Operators(TorchDispatchMode):
    """Counts eager operators by name; views and the profiler's marks are left out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in VIEWS and not name.startswith("profiler"):
            self.counts[name] += 1
        return function(*args, **kwargs or {})
