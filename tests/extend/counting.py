"""A transform without a table of rules: it counts the ops that read an argument of the function."""

from collections import Counter

from lamina.extend import (
    Interpreter,
    LevelTensor,
    facts,
    lower,
    map_tensors,
    mutate,
    pass_down,
    pytree,
    record_views,
    refresh_all,
    strip_dead,
    tensors_in,
)


class CountedTensor(LevelTensor):
    """Depends on the arguments."""

    __slots__ = ("depends",)
    holds = ("value",)


class Counting(Interpreter):
    wrapper = CountedTensor
    transform = "counting"

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def constant(self, value):
        return self.wrap(value, depends=False)

    def is_constant(self, x):
        return not x.depends

    def process(self, op, args, kwargs):
        args, kwargs = pytree.tree_map(strip_dead, (args, kwargs))
        if self.mutated:
            refresh_all(self, args, kwargs)
        own = [x for x in tensors_in(args, kwargs) if self.is_own(x)]
        if not own:
            return pass_down(self, op, args, kwargs)
        if facts(op).mutated:
            return mutate(self, op, args, kwargs)
        depends = any(x.depends for x in own)
        self.counts[str(op)] += depends
        values = pytree.tree_map(lambda x: x.value if self.is_own(x) else x, (args, kwargs))
        out = map_tensors(lambda x: self.wrap(x, depends=depends), lower(self, op, *values))
        return record_views(out, op, args, kwargs) if facts(op).is_view else out


def counted(f):
    """`f`, and how often it ran which op on what depends on its arguments."""

    def run(*args):
        with Counting() as level:
            out = f(*pytree.tree_map(lambda x: level.wrap(x, depends=True), args))
            refresh_all(level, pytree.leaves(out), {})
        values = pytree.tree_map(lambda x: x.value if level.is_own(x) else x, out)
        return values, +level.counts

    return run
